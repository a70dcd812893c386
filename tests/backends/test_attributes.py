"""Attributes that are brought back to what they were: the core, without a database; and what that
costs a real connection."""

from __future__ import annotations

import gc
import timeit
from collections import deque
from types import SimpleNamespace
from typing import Any

from django.db import connections
from django.utils.functional import cached_property

from django_asyncsession import Session
from django_asyncsession.backends.attributes import Attributes, copied


class Owner:
    kind = "default"

    def __init__(self) -> None:
        self.plain = 1
        self.nested: Any = {"a": [1, {"b": {2}}], "q": deque([[1]], maxlen=3)}
        self.helper = SimpleNamespace(connection=self)
        self.ours = 0

    @cached_property
    def computed(self) -> Any:
        return self.nested["a"][0]


def test_nested_containers_are_brought_back_whole() -> None:
    owner = Owner()
    attributes = Attributes(owner, frozenset({"ours"}))
    before = copied(owner.nested)
    old = owner.nested
    owner.nested["a"][1]["b"].add(3)
    owner.nested["q"][0].append(2)
    owner.ours = 1
    attributes.restore(owner)
    assert owner.nested == before and owner.nested["q"].maxlen == 3
    assert owner.nested is not old and owner.ours == 1
    old["a"].clear()
    assert owner.nested == before


def test_what_was_computed_from_something_changed_is_computed_again() -> None:
    owner = Owner()
    attributes = Attributes(owner)
    owner.nested["a"][0] = "changed"
    assert owner.computed == "changed"
    attributes.restore(owner)
    assert owner.computed == 1
    attributes.restore(owner)
    assert "computed" in vars(owner)


def test_a_default_of_the_class_comes_back_and_what_belongs_to_helpers_goes() -> None:
    owner = Owner()
    attributes = Attributes(owner)
    for _ in range(2):
        owner.kind, owner.helper.left, owner.helper.connection = "other", 1, None
        attributes.restore(owner)
        assert owner.kind == "default" and not hasattr(owner.helper, "left")
        assert owner.helper.connection is owner


async def test_a_lease_that_left_nothing_costs_microseconds(real_session: Session) -> None:
    """Far below a round trip; a bound that no busy machine breaks."""
    wrapper: Any = await real_session.run_sync(lambda: connections[real_session.alias])
    attributes = wrapper._opened
    assert attributes is not None
    gc.collect()
    assert min(timeit.repeat(lambda: attributes.restore(wrapper), number=100, repeat=5)) < 0.02
