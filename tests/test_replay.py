"""The edits of a rewrite as data give the same classes again, whatever form the sums have; damaged data give an error of one kind."""

from __future__ import annotations

import contextlib
import copy
import functools
import json

import pytest
import torch
from conftest import real
from forms import FORMS, D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import CASES

from laurel_rewrite import ConfigError, rewrite
from laurel_rewrite.backends.module.replay import replayed
from laurel_rewrite.backends.module.surgery import rewriting_of


def same_classes(model: nn.Module, better: nn.Module) -> None:
    record = rewriting_of(better)
    again = replayed(json.loads(json.dumps(record.edits)), model, record.plan.sites, "here")
    assert {owner: edited.rewritten for owner, edited in again.items()} == record.classes
    assert all(edited.rewritten.cls is record.classes[owner].cls for owner, edited in again.items())


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_made_again(name):
    torch.manual_seed(0)
    model = FORMS[name]()
    same_classes(model, rewrite(model, (torch.randn(3, 6, D),), rank=4, verify=False))


@pytest.mark.parametrize("name", ["gpt2", "bert", "falcon", "t5", "resnet18"])
def test_a_real_model_is_made_again(name):
    example = real(name)
    same_classes(example.model, rewrite(example.model, example.args, example.kwargs, rank=4, verify=False))


@functools.cache
def plain() -> tuple[nn.Module, dict]:
    model = CASES["plain"].make()
    return model, rewriting_of(rewrite(model, (torch.randn(2, 5, D),), rank=4, verify=False)).edits


def places(data: object, path: tuple = ()) -> list[tuple]:
    """The way to every value inside nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [place for key, value in inner for place in places(value, (*path, key))]


@settings(max_examples=150)
@given(st.data())
def test_damaged_data_are_an_error_or_the_same_edits(data):
    model, edits = plain()
    damaged = copy.deepcopy(edits)
    *way, last = data.draw(st.sampled_from(places(damaged)))
    holder = damaged
    for key in way:
        holder = holder[key]
    holder[last] = data.draw(st.sampled_from([None, -1, 0, 7, 10**9, "", "x; y", "os", [], {}, [0], True, 1.5]))
    with contextlib.suppress(ConfigError):
        replayed(damaged, model, (), "here")


def test_a_site_without_an_edit_is_an_error():
    model = CASES["plain"].make()
    record = rewriting_of(rewrite(model, (torch.randn(2, 5, D),), rank=4, verify=False))
    edits = copy.deepcopy(record.edits)
    (entry,) = edits["classes"]
    del entry["changes"][-1]
    with pytest.raises(ConfigError, match=r"nothing is edited for the site .*laurel_1, so that its connection would not be called"):
        replayed(edits, model, record.plan.sites, "here")
