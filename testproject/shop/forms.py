"""What people and programs may send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import forms

from testproject.shop.models import Author, Book, Stock

MAX_COPIES = 99

if TYPE_CHECKING:
    _BookModelForm = forms.ModelForm[Book]
else:
    # Only its types are generic.
    _BookModelForm = forms.ModelForm


class BookForm(_BookModelForm):
    """A new book; the author is named, and must be known."""

    author = forms.ModelChoiceField(Author.objects.all(), to_field_name="name")

    class Meta:
        model = Book
        fields = ("title", "author", "isbn", "price", "published", "about")


class TransferForm(forms.Form):
    """Copies of a book that go from one place to another."""

    book = forms.IntegerField(min_value=1)
    source = forms.ChoiceField(choices=Stock.Place.choices)
    target = forms.ChoiceField(choices=Stock.Place.choices)
    quantity = forms.IntegerField(min_value=1, max_value=10_000)

    def clean(self) -> dict[str, Any]:
        """Refuse a transfer from a place to itself."""
        data = self.cleaned_data
        if data.get("source") and data.get("source") == data.get("target"):
            self.add_error("target", "The copies are there already.")
        return data


class LineForm(forms.Form):
    """One line of an order that a program sends."""

    book = forms.IntegerField(min_value=1)
    quantity = forms.IntegerField(min_value=1, max_value=MAX_COPIES)


class CustomerForm(forms.Form):
    """Who orders."""

    name = forms.CharField(max_length=100, widget=forms.TextInput({"autocomplete": "name"}))
    email = forms.EmailField(label="E-mail", widget=forms.EmailInput({"autocomplete": "email"}))


class OrderForm(CustomerForm):
    """An order of one book, as the page sends it."""

    # The book that a valid ISBN names.
    book: Book | None = None

    isbn = forms.CharField(
        label="ISBN",
        max_length=17,
        help_text="13 digits; the catalogue's order links fill it in.",
        widget=forms.TextInput({"inputmode": "numeric", "spellcheck": "false"}),
    )
    quantity = forms.IntegerField(min_value=1, max_value=MAX_COPIES, initial=1)
    note = forms.CharField(
        max_length=200, required=False, widget=forms.TextInput({"placeholder": "optional"})
    )

    def clean_isbn(self) -> str:
        """The ISBN without hyphens and spaces, of a book that the shop has."""
        isbn = self.cleaned_data["isbn"].replace("-", "").replace(" ", "")
        self.book = Book.objects.select_related("author").filter(isbn=isbn).first()
        if self.book is None:
            raise forms.ValidationError("We have no book with this ISBN.")
        return str(isbn)
