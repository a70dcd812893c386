"""Django's class-based views, run natively async in the request's session.

Django's own code does all the work, unchanged: it runs in the bridge.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.template.response import SimpleTemplateResponse
from django.utils.decorators import classonlymethod
from django.views import generic

from . import bridge
from .conf import settings
from .exceptions import ConfigurationError
from .native.routes import keeps_thread

if TYPE_CHECKING:
    from django.db.models import Model
    from django.forms import BaseForm, Form, ModelForm
    from django.forms.models import BaseModelForm
    from django.http import HttpResponse
    from typing_extensions import TypeVar as TypeVarWithDefault

Run = Callable[[Callable[[], Any]], Awaitable[Any]]
AsyncView = Callable[..., Coroutine[Any, Any, HttpResponseBase]]
# What the code of an `async def` is marked with.
ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class View(generic.View):
    """The base of these views, which also makes any other class-based view native:
    `class Login(View, LoginView)`.

    Everything that Django calls, from `setup` to the rendering of the template, runs in the
    request's session. A method of Django's that is overridden with `async def` is awaited where
    Django's code calls it, and what sync code it calls itself, `super()` included, runs natively.
    """

    view_is_async = True
    # Names of the methods that may be called by sync code although they are async.
    _async_methods: tuple[str, ...] = ()

    def __class_getitem__(cls, types: Any) -> type[Self]:
        """The class itself: only its types are generic."""
        return cls

    @classonlymethod
    def as_view(cls, **initkwargs: Any) -> AsyncView:  # type: ignore[override]
        """The async view, for a URL.

        Args:
            initkwargs: attributes of the view.

        Raises:
            ConfigurationError: the class is marked with `@keep_thread`; and, when it is called, the
                request has no session.
            TypeError: the class has no such attribute.
        """
        if keeps_thread(cls):
            raise ConfigurationError(
                f"{cls.__qualname__} is marked with @keep_thread, and native views have no thread; "
                "derive it from the view of django.views.generic"
            )
        cls._async_methods = _async_methods(cls)
        view = super().as_view(**initkwargs)

        @wraps(view)
        async def native(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            # What blocks the event loop is named after the view.
            @wraps(cls, updated=())
            def respond() -> Any:
                return _settled(view(request, *args, **kwargs))

            run = _runner(request, cls)
            return _rendered_natively(await run(respond), run)

        return native

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Inside, Django's code calls methods and gets responses: everything is sync there.
        self.view_is_async = False
        for name in self._async_methods:
            setattr(self, name, _awaited_by_sync_code(getattr(self, name)))

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Call the handler for the request's method; a plain one may return another async view's
        response unawaited."""
        # Before the decorators of a subclass's `dispatch` get it.
        return cast(HttpResponseBase, _settled(super().dispatch(request, *args, **kwargs)))


def _async_methods(cls: type[View]) -> tuple[str, ...]:
    """The handlers, and the methods that are plain in some of the classes, that are async in
    others."""
    return tuple(name for name in dir(cls) if _may_be_async(cls, name))


def _may_be_async(cls: type[View], name: str) -> bool:
    found = [vars(base)[name] for base in cls.__mro__ if name in vars(base)]
    if not any(map(iscoroutinefunction, found)):
        return False
    is_plain = (callable(method) and not iscoroutinefunction(method) for method in found)
    return name in cls.http_method_names or any(is_plain)


def _awaited_by_sync_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method, which gives sync code its result, and async code what it awaits."""

    @wraps(method)
    def awaited(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        by_async_code = sys._getframe(1).f_code.co_flags & ASYNC
        return result if by_async_code else _settled(result)

    return awaited


def _settled(result: Any) -> Any:
    """The result, once what is to be awaited for it has been."""
    if bridge.in_bridge() and inspect.isawaitable(result):
        return bridge.await_here(result)
    return result


def _runner(request: HttpRequest, cls: type[View]) -> Run:
    """What runs sync code in the request's session."""
    session = getattr(request, settings.REQUEST_ATTRIBUTE, None)
    if session is None:
        raise ConfigurationError(
            f"{cls.__qualname__} runs in the request's session, and the request has none; put "
            "django_asyncsession.middleware.AsyncSessionMiddleware first in MIDDLEWARE, or in a "
            f"test of the view alone set request.{settings.REQUEST_ATTRIBUTE}"
        )
    # In native mode a view that uses no database takes no connection.
    run: Run = session.run_sync if session.companions is None else session.companions.run
    return run


def _rendered_natively(response: HttpResponseBase, run: Run) -> HttpResponseBase:
    """Let a template response be rendered when Django does that, after the middleware's
    `process_template_response`, and in the session."""
    if isinstance(response, SimpleTemplateResponse) and not response.is_rendered:
        response.render = partial(_render, response, run)  # type: ignore[assignment]
    return response


async def _render(response: SimpleTemplateResponse, run: Run) -> Any:
    # What is called when it is rendered may pickle it, or render it as sync code does.
    del response.render
    return await run(response.render)


if TYPE_CHECKING:
    M = TypeVar("M", bound=Model)
    FormT = TypeVar("FormT", bound=BaseForm)
    DeleteFormT = TypeVarWithDefault("DeleteFormT", bound=BaseForm, default=Form)
    ModelFormT = TypeVarWithDefault("ModelFormT", bound=BaseModelForm[Any], default=ModelForm[M])
    ResponseT = TypeVarWithDefault("ResponseT", bound=HttpResponse, default=HttpResponse)

    class TemplateView(View, generic.TemplateView[ResponseT]): ...

    class RedirectView(View, generic.RedirectView): ...

    class ListView(View, generic.ListView[M]): ...

    class DetailView(View, generic.DetailView[M]): ...

    class FormView(View, generic.FormView[FormT]): ...

    class CreateView(View, generic.CreateView[M, ModelFormT]): ...

    class UpdateView(View, generic.UpdateView[M, ModelFormT]): ...

    class DeleteView(View, generic.DeleteView[M, DeleteFormT]): ...

else:
    # Django's classes are generic for type checkers only.
    class TemplateView(View, generic.TemplateView):
        """Renders a template."""

    class RedirectView(View, generic.RedirectView):
        """Redirects every request."""

    class ListView(View, generic.ListView):
        """Shows the rows of a model or a queryset, in pages if it is told to."""

    class DetailView(View, generic.DetailView):
        """Shows one row."""

    class FormView(View, generic.FormView):
        """Shows a form, and does something with a valid one."""

    class CreateView(View, generic.CreateView):
        """Shows a form, and saves a new row."""

    class UpdateView(View, generic.UpdateView):
        """Shows a row in a form, and saves it."""

    class DeleteView(View, generic.DeleteView):
        """Asks whether a row shall be deleted, and deletes it."""
