"""A verdict counts when it lasts: over chance findings, over a start, over a contraction."""

import json

import pytest

from mmscale.diagnostics.doctor import judge
from mmscale.diagnostics.geometry import health_figures
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.persistence import Persistence
from tests.unit.diagnostics.faulty_embeddings import dead, healthy, isotropic, joint_collapse

BAD = ("complete_collapse", "dead_tower", "unaligned")


def figures_of(make, seed=0):
    pairs = make(128, 64, seed)
    return health_figures(pairs) | pairing_figures(pairs)


GOOD, UNALIGNED, DEAD, COLLAPSED = (
    figures_of(make) for make in (healthy(0.5), isotropic, dead("image"), joint_collapse(0.0))
)


def course(persistence, probes, every=10):
    """The alarm after each probe: its verdict or None."""
    alarms = [
        persistence.take(every * number, figures, judge(figures))
        for number, figures in enumerate(probes, start=1)
    ]
    return [None if alarm is None else alarm.diagnosis.verdict for alarm in alarms]


def test_persistence_needs_consecutive_findings():
    persistence = Persistence(3, 0, BAD)
    probes = [GOOD, UNALIGNED, UNALIGNED, GOOD, UNALIGNED, UNALIGNED, GOOD]
    assert course(persistence, probes) == [None] * 7


def test_persistence_resumed_from_json_after_any_probe_alarms_alike():
    """Among it what the towers contract from, which the very first look told."""
    probes = [GOOD, *[UNALIGNED] * 4, *[DEAD] * 3, GOOD, *[UNALIGNED] * 3]
    whole, resumed = Persistence(3, 0, BAD), Persistence(3, 0, BAD)
    whole.begin(GOOD)
    resumed.begin(GOOD)
    told = []
    for number, figures in enumerate(probes, start=1):
        state = json.loads(json.dumps(resumed.state()))
        resumed = Persistence(3, 0, BAD)
        resumed.load(state)
        for persistence in (whole, resumed):
            alarm = persistence.take(number, figures, judge(figures))
            told.append(None if alarm is None else (alarm.diagnosis.verdict, alarm.began))
        assert resumed.state() == whole.state()
    assert told[::2] == told[1::2]
    assert {verdict for verdict, _ in filter(None, told)} == {"unaligned", "dead_tower"}


def test_a_lasting_verdict_alarms_once_and_again_after_it_was_gone():
    persistence = Persistence(3, 0, BAD)
    told = course(persistence, [UNALIGNED] * 6 + [GOOD] * 3 + [UNALIGNED] * 3)
    assert told == [None, None, "unaligned", *[None] * 8, "unaligned"]


def test_persistence_is_silent_within_the_grace():
    assert course(Persistence(3, 60, BAD), [UNALIGNED] * 6 + [GOOD] * 3) == [None] * 9
    assert course(Persistence(3, 60, BAD), [UNALIGNED] * 9)[-1] == "unaligned"


def test_only_named_verdicts_count():
    assert course(Persistence(2, 0, ("hubness",)), [UNALIGNED] * 4) == [None] * 4


def test_persistence_counts_verdicts_that_another_hides():
    """A dying tower: unaligned all along, dead at last."""
    told = course(Persistence(3, 0, BAD), [UNALIGNED, UNALIGNED, DEAD, DEAD, DEAD])
    assert told == [None, None, "unaligned", None, "dead_tower"]


def with_course(variance, z):
    return GOOD | {
        "health/variance_image": variance,
        "health/variance_text": variance,
        "health/delta_z": z,
    }


def test_a_contraction_counts_also_at_the_beginning():
    probes = [
        with_course(v, z) for v, z in [(0.6, 20), (0.2, 25), (0.04, 24), (0.03, 23), (0.025, 22)]
    ]
    assert course(Persistence(3, 1000, BAD), probes) == [None] * 4 + ["complete_collapse"]


def test_a_contraction_in_which_pairs_stand_out_more_is_learning():
    probes = [
        with_course(v, z)
        for v, z in [(0.6, 20), (0.2, 40), (0.04, 60), (0.03, 66), (0.03, 70), (0.2, 75)]
    ]
    assert course(Persistence(3, 1000, BAD), probes) == [None] * 6


def test_one_contracting_tower_alarms_as_dead_tower_within_the_grace():
    wide, narrow = with_course(0.6, 1), with_course(0.6, 1) | {"health/variance_text": 0.01}
    persistence = Persistence(2, 1000, BAD)
    persistence.begin(wide)
    assert course(persistence, [narrow, narrow]) == [None, "dead_tower"]


def test_a_model_that_begins_in_a_cone_has_not_contracted():
    probes = [with_course(0.03, 0.5)] * 6
    assert course(Persistence(3, 1000, BAD), probes) == [None] * 6


def test_the_alarm_says_since_when_and_on_which_figures():
    persistence = Persistence(2, 0, BAD)
    persistence.take(10, GOOD, judge(GOOD))
    persistence.take(20, COLLAPSED, judge(COLLAPSED))
    alarm = persistence.take(30, COLLAPSED, judge(COLLAPSED))
    assert alarm.began == 20
    assert alarm.diagnosis.verdict == "complete_collapse"
    assert alarm.diagnosis.evidence["variance_image"] == pytest.approx(0, abs=1e-6)
    assert alarm.diagnosis.remedies
