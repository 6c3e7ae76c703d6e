"""Lists of policies: commas, repeated options, YAML, labels, groups, mistakes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.policy_list import (
    GROUPS,
    NamedPolicy,
    choose,
    default_names,
    named,
    split_list,
)
from biscale_env.policies import known_policies, phases_of
from biscale_env.policies.checkpoint_source import SHIPPED
from controllers.ablations import beliefs, variants

BOTH = ("prefill", "decode")
PARAMETERS = st.sampled_from(["0.1", "margin=0.1", "margin=0.1,forecast=4", "fine=true"])
ENTRIES = st.builds(
    lambda label, base, rest: f"{label}{base}{rest and ':' + rest}",
    st.sampled_from(["", "my=", "other name=", "a1="]),
    st.sampled_from(["max", "mpc", "agent", "static", "runs/a/best.npz", "mine:Rule"]),
    st.one_of(st.just(""), PARAMETERS),
)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("max,mpc", ["max", "mpc"]),
        ("mpc:give_up=true,margin=0.2,my=a/b.zip", ["mpc:give_up=true,margin=0.2", "my=a/b.zip"]),
        ("slack:0.1,fine=true, slack", ["slack:0.1,fine=true", "slack"]),
        ("mpc:margin=0.1,a=static:900", ["mpc:margin=0.1", "a=static:900"]),
        ("mpc:margin=0.1,a=mpc,b=all", ["mpc:margin=0.1", "a=mpc", "b=all"]),
        ("a=static:900,b=static:900", ["a=static:900", "b=static:900"]),
        ("mine:Rule:gain=2,level=3,max", ["mine:Rule:gain=2,level=3", "max"]),
        (" , ,", []),
    ],
)
def test_commas_of_parameters_stay_in_their_policy(text, entries):
    assert split_list(text) == entries


@pytest.mark.slow
@given(st.lists(ENTRIES, max_size=5))
def test_a_list_is_the_entries_that_were_joined(entries):
    assert split_list(",".join(entries)) == entries


def test_labels_and_paths_with_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named("my=mpc:margin=0.1") == NamedPolicy("my", "mpc:margin=0.1")
    assert named("mpc:margin=0.1") == NamedPolicy("mpc:margin=0.1", "mpc:margin=0.1")
    assert named("a/lr=1/best.npz") == NamedPolicy("a/lr=1/best.npz", "a/lr=1/best.npz")
    assert named("lr=1") == NamedPolicy("lr", "1")
    (tmp_path / "lr=1").mkdir()
    assert named("lr=1") == NamedPolicy("lr=1", "lr=1")


@pytest.mark.parametrize("phase", BOTH)
def test_groups_stand_for_many(phase):
    whole = choose(GROUPS, (phase,))[phase]
    assert whole[0] == ("max", "max")
    builds = [build for _, build in whole]
    others = {*variants(phase).values(), *beliefs(phase).values()}
    assert set(builds) >= {*default_names(phase), *others}
    assert choose(None, (phase,)) == choose(["all"], (phase,)) == choose([], (phase,))
    assert "agent" in default_names(phase)
    assert set(default_names(phase)) <= set(known_policies(phase))


def test_a_name_for_the_other_phase_is_passed_over():
    chosen = choose(["mpc", "slack", "static:900"], BOTH)
    assert [build for _, build in chosen["prefill"]] == [
        "max",
        "static-hindsight",
        "mpc",
        "static:900",
    ]
    assert [build for _, build in chosen["decode"]] == [
        "max",
        "static-hindsight",
        "slack",
        "static:900",
    ]
    assert phases_of("mpc") == ("prefill",)
    assert choose(["oracle", "static-best"], BOTH)["decode"][2:] == [
        ("oracle", "oracle"),
        ("static-best", "static-best"),
    ]


def test_a_checkpoint_of_a_phase_that_is_not_compared_is_refused():
    path = SHIPPED / "prefill.npz"
    with pytest.raises(
        BiscaleError, match="policy 'my': the checkpoint is for prefill, which is not compared here"
    ):
        choose(["all", f"my={path}"], ("decode",))
    assert ("my", str(path)) in choose(["all", f"my={path}"], BOTH)["prefill"]
    with pytest.raises(BiscaleError, match="the checkpoint is for prefill"):
        choose([f"{path}:margin=0.1"], ("decode",))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["mpx"], "unknown policy 'mpx': did you mean 'mpc'?"),
        (["max=static:1200"], "two policies are called 'max'"),
        (["a=static:900", "a=static:1200"], "two policies are called 'a'"),
        (["statc-best"], "did you mean 'static-best'?"),
    ],
)
def test_mistakes_are_one_sentence(entries, says):
    with pytest.raises(BiscaleError, match=says) as caught:
        choose(entries, BOTH)
    assert "\n" not in str(caught.value)
