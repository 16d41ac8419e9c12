"""One connection that is written twice, of which one capture can run only one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from toys import Net, X

from laurel_rewrite import detect, rewrite


class Twofold(Net):
    def __init__(self, body):
        super().__init__(body)
        self.use_checkpoint = self.norm_first = False


def checkpointed(s, x):
    if s.use_checkpoint:
        x = x + checkpoint(s.a, x, use_reentrant=False)
        return x
    x = x + s.a(x)
    return x


def by_length(s, x):
    if x.shape[1] > 99:
        x += s.a(x[:, :99]).mean(1, keepdim=True)
    else:
        x = torch.add(x, s.a(x))
    return x * 2


def configured(s, x):
    if s.norm_first:
        x = x + s.a(s.norm(x))
        return x
    x = s.norm(x + s.a(x))
    return x


def unlike(s, x):
    if x.shape[1] > 99:
        x = x + s.table  # nothing is called
        y = x + s.b(x)  # another name
        return y
    x = x + s.a(x)
    return x


@pytest.mark.parametrize(("body", "said"), [(checkpointed, True), (by_length, True), (configured, False), (unlike, False)])
def test_an_addition_that_was_not_run_and_may_be_is_said(body, said, caplog):
    sites = detect(Twofold(body), (X,))
    assert len(sites) == 1
    notes = [note for note in sites.notes if "were not run" in note]
    assert len(notes) == said
    rewrite(Twofold(body), (X,), rank=4)
    assert ("were not run" in caplog.text) == said
    if said:
        assert f": test_unrun.py:{body.__code__.co_firstlineno + 2}. " in notes[0]


def test_what_both_modes_run_was_run():
    def body(s, x):
        if s.training:
            x = x + s.a(x)
            return x
        x = x + s.b(x)
        return x

    assert not any("were not run are" in note for note in detect(Twofold(body), (X,)).notes)
