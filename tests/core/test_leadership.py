"""One replica's view of its lease, in literal times. Of a lease of 10 s it believes in 9, from the asking."""

import pytest

from headway.core.errors import ConfigError
from headway.core.leadership import Fence, Leadership, read_token


def asked(lead, now):
    claim = lead.claim(now)
    assert claim is not None
    return claim


def test_it_asks_at_once_and_leads_from_the_answer_on():
    lead = Leadership(10.0)
    claim = asked(lead, 100.0)
    assert lead.token(100.1) is None
    lead.granted(claim, 7, 100.2)
    assert lead.token(100.2) == 7


def test_it_believes_in_the_lease_from_the_asking_whenever_the_answer_came():
    lead = Leadership(10.0)
    lead.granted(asked(lead, 100.0), 7, 102.0)
    assert lead.token(108.999) == 7
    assert lead.token(109.0) is None


def test_an_answer_that_took_longer_than_the_lease_is_worth_nothing():
    lead = Leadership(10.0)
    lead.granted(asked(lead, 100.0), 7, 109.5)
    assert lead.token(109.5) is None
    assert lead.wake_at() == 109.5


def test_it_renews_after_a_third_and_keeps_its_token():
    lead = Leadership(9.0)
    lead.granted(asked(lead, 0.0), 7, 0.1)
    assert lead.wake_at() == 3.0
    assert lead.claim(2.9) is None
    lead.granted(asked(lead, 3.0), 7, 3.1)
    assert lead.until_s == pytest.approx(3.0 + 8.1)


def test_a_store_that_does_not_answer_is_asked_again_soon_and_believed_in_no_longer_than_before():
    lead = Leadership(10.0)
    lead.granted(asked(lead, 0.0), 7, 0.1)
    lead.failed(asked(lead, 4.0), 4.5)
    assert lead.wake_at() == 5.5
    assert (lead.token(8.9), lead.token(9.0)) == (7, None)


def test_patience_with_an_answer_ends_and_it_is_not_listened_to_any_more():
    lead = Leadership(10.0)
    late = asked(lead, 0.0)
    assert lead.wake_at() == 2.5
    assert lead.claim(2.4) is None
    second = asked(lead, 2.5)
    lead.granted(late, 6, 2.6)
    assert lead.token(2.6) is None
    lead.refused(second, "gw-1", 8.0, 2.7)
    assert lead.leader == "gw-1"


def test_a_follower_asks_when_the_lease_of_the_other_runs_out():
    lead = Leadership(9.0)
    lead.refused(asked(lead, 0.0), "gw-1", 2.0, 0.1)
    assert lead.wake_at() == 2.1


def test_and_meanwhile_now_and_then_for_it_may_be_given_back():
    lead = Leadership(9.0)
    lead.refused(asked(lead, 0.0), "gw-1", 8.0, 0.0)
    assert lead.wake_at() == 3.0


def test_it_knows_of_a_dead_leader_after_the_length_of_a_lease():
    """The leader renews at 0 and dies; its follower had asked just before."""
    lead = Leadership(9.0)
    assert lead.takeover_s == 9.0
    now, died_s = -0.1, 0.0
    lead.refused(asked(lead, now), "gw-1", 8.9, now)
    while now < died_s + 9.0:
        now = lead.wake_at()
        claim = asked(lead, now)
        if now < died_s + 9.0:
            lead.refused(claim, "gw-1", died_s + 9.0 - now, now)
        else:
            lead.granted(claim, 8, now)
    assert now == pytest.approx(9.0)
    assert lead.token(now) == 8


def test_whoever_is_not_the_first_choice_asks_a_tenth_later_for_each_that_is():
    lead = Leadership(10.0, rank=2)
    assert lead.claim(5.0) is None
    assert lead.wake_at() == 7.0
    lead.refused(asked(lead, 7.0), "gw-1", 3.0, 7.0)
    assert lead.wake_at() == 12.0


def test_refused_it_leads_no_more():
    """Its lease had run out at the store though not here: the store lost its memory."""
    lead = Leadership(10.0)
    lead.granted(asked(lead, 0.0), 7, 0.1)
    lead.refused(asked(lead, 4.0), "gw-1", 9.0, 4.1)
    assert lead.token(4.1) is None


def test_an_engine_that_has_seen_a_newer_token_ends_the_term_and_the_next_is_above_it():
    lead = Leadership(10.0)
    lead.granted(asked(lead, 0.0), 7, 0.1)
    assert lead.fenced(12)
    assert lead.token(0.2) is None
    assert asked(lead, 0.2).above == 12
    assert not lead.fenced(12)  # the next leg hears it too; the claim that is under way goes on


def test_its_own_token_or_an_older_one_is_no_news():
    lead = Leadership(10.0)
    lead.granted(asked(lead, 0.0), 7, 0.1)
    assert not lead.fenced(7)
    assert lead.token(0.2) == 7


def test_given_up_it_never_asks_again():
    lead = Leadership(10.0)
    lead.granted(asked(lead, 0.0), 7, 0.1)
    late = asked(lead, 4.0)
    assert lead.give_up() == 7
    lead.granted(late, 7, 4.1)
    assert lead.token(4.2) is None
    assert lead.claim(1e9) is None
    assert lead.give_up() is None


@pytest.mark.parametrize("lease_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lease_has_a_length(lease_s):
    with pytest.raises(ConfigError, match="lease_s must be a positive number"):
        Leadership(lease_s)


def test_an_engine_serves_the_newest_token_and_those_without_one():
    fence = Fence()
    assert [fence.admits(token) for token in (5, 5, 7, 5, None, 7)] == [True, True, True, False, True, True]
    assert fence.newest == 7


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("7", 7),
        ("1764000000000", 1764000000000),
        (None, None),
        ("", None),
        ("0", None),
        ("-7", None),
        ("7.0", None),
        ("٧", None),
        ("9" * 16, None),
        ("9" * 400, None),
    ],
)
def test_a_token_is_a_number_that_stores_can_count_to(text, token):
    assert read_token(text) == token
