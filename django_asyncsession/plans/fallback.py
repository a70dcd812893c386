"""Why a query runs Django's own way and not on a plan: each reason has a name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

#: What each name means, as the end of a sentence.
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "off": 'ASYNC_SESSION["PLANS"] is False',
        "source": "it does not begin with a model, but with a QuerySet, a manager or another query",
        "manager": "the model's default manager, or its QuerySet, has methods of its own",
        "patched": "another package has replaced methods of Django's compiler or QuerySet",
        "step": "it uses a method that plans do not know",
        "expression": "a condition, an order or a column of it is an expression",
        "value_type": "a value is not of the plain type of its field",
        "out_of_range": "a number is out of the range of its column",
        "not_finite": "a number is infinite or no number",
        "naive": "a date and time has no time zone, or a time has one",
        "nul": "a text cannot be sent: it has a NUL or half of a surrogate pair",
        "list": "a list of values is empty, has None or several types in it, or is very long",
        "lookup": "it uses a lookup that plans do not know",
        "field": "it compares a field of a class that plans do not know",
        "relation": "it goes over a relation that plans do not know",
        "composite": "it is about a key of several columns",
        "parameters": "the parameters that Django makes of its values do not tell whose they are",
        "text": "Django writes another text for other values",
        "empty": "Django knows without asking that there is no such row",
        "slice": "it counts a part of the rows, or distinct ones",
        "columns": "it selects more than columns",
        "model": "the model has its own `from_db`, `__init__`, `__new__` or `__setattr__`",
        "descriptor": "an attribute of the model does something when it is set",
        "signals": "there are receivers of `pre_init` or `post_init`",
        "encoding": "a parameter has no text that the server would take as the same",
        "database": "its alias is another kind of database than the plan was made for",
        "query": "the QuerySet uses something that plans do not know",
        "several": "there are several rows with one primary key",
        "differs": "Django's compiler once gave something else, so its plan was thrown out",
        "error": "making its plan failed, which is logged",
    }
)


class Fallback(Exception):
    """The query is to run Django's own way.

    Args:
        reason: its name, a key of `REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason
