"""Generated workloads with SLO classes: shares, lengths of their own, sessions of one class."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from biscale_env.config import load_slo
from biscale_env.traces import generate
from biscale_env.traces.synthetic.profiles import WorkloadProfile, load_workload
from biscale_env.traces.synthetic.synthesize import WorkloadRecipe

MIXED = load_workload("interactive-batch-like")
PLAIN = MIXED.model_copy(update={"classes": {}})
CHATS = load_workload("chat-sessions")


def with_classes(profile, **classes):
    return WorkloadProfile.model_validate(profile.model_dump() | {"classes": classes})


def test_shares_and_lengths_of_each_class():
    made = generate(MIXED, rate_rps=40.0, duration_s=600.0, seed=3)
    names = made.classes.each()
    assert np.mean(names == "batch") == pytest.approx(0.3, abs=0.01)
    assert set(names.tolist()) == {"interactive", "batch"}
    alike = generate("azure-code-like", rate_rps=40.0, duration_s=600.0, seed=1)
    for column in ("prompt_tokens", "output_tokens"):
        own = getattr(made, column)[names == "batch"].mean()
        assert own == pytest.approx(getattr(alike, column).mean(), rel=0.05)
    # the shipped SLO knows these classes
    assert set(made.classes.numbers(load_slo("interactive-batch"), "made").tolist()) == {1, 2}


def test_arrivals_and_other_lengths_are_those_without_classes():
    made, plain = (generate(profile, duration_s=300.0, seed=5) for profile in (MIXED, PLAIN))
    assert made.arrival_s.tolist() == plain.arrival_s.tolist()
    chats = made.classes.each() == "interactive"
    assert made.prompt_tokens[chats].tolist() == plain.prompt_tokens[chats].tolist()
    assert (made.prompt_tokens != plain.prompt_tokens)[~chats].mean() > 0.9
    assert plain.classes is None
    again = generate(MIXED, duration_s=300.0, seed=5)
    assert again == made
    assert generate(MIXED, duration_s=300.0, seed=6) != made


def test_what_shares_leave_has_no_class_and_a_session_has_one():
    profile = with_classes(CHATS, batch={"share": 0.25}, chat={"share": 0.5})
    made = generate(profile, rate_rps=10.0, duration_s=600.0, seed=0)
    names, session = made.classes.each(), made.blocks.session
    assert np.mean(names == "none") == pytest.approx(0.25, abs=0.05)
    for number in np.unique(session):
        assert len(set(names[session == number].tolist())) == 1
    plain = generate(CHATS, rate_rps=10.0, duration_s=600.0, seed=0)
    assert made.blocks.content() == plain.blocks.content()


def test_a_profile_without_classes_is_written_as_it_always_was():
    assert "classes" not in json.loads(PLAIN.model_dump_json())
    digests = {WorkloadRecipe.of(profile).digest for profile in (MIXED, PLAIN)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"a": {"share": 0.7}, "b": {"share": 0.4}}, "add up to more than 1"),
        ({"a": {"share": 0.0}}, "greater than 0"),
        ({"a": {"share": 0.5, "lengths": "azure-code"}}, "leave lengths out"),
    ],
)
def test_classes_that_cannot_be_are_refused(classes, words):
    with pytest.raises(ValidationError, match=words):
        with_classes(CHATS, **classes)
