from fakes import FakeView, decode, prompt

from headway.core.batch import fill as module


def fill(*args, **options):
    return module.fill(*args, **options).prefills


def test_prompts_begun_come_before_waiting_ones_and_the_last_is_chunked():
    begun, first, second = prompt(1000, done=900), prompt(300), prompt(300)
    view = FakeView(waiting=[first, second], prefilling=[begun])
    assert fill(view, 500) == [(begun, 100), (first, 300), (second, 100)]


def test_a_prompt_needs_a_free_seat_to_begin():
    first, second = prompt(10), prompt(10)
    assert fill(FakeView(waiting=[first, second], free_seats=1), 500) == [(first, 10)]


def test_a_prompt_begins_only_if_all_of_it_fits_beside_the_rest_of_those_begun():
    begun = prompt(160, done=80)  # still needs 5 blocks
    fits, too_long = prompt(80), prompt(81)
    assert fill(FakeView(waiting=[fits], prefilling=[begun], free_blocks=10), 500) == [
        (begun, 80),
        (fits, 80),
    ]
    assert fill(FakeView(waiting=[too_long], prefilling=[begun], free_blocks=10), 500) == [(begun, 80)]


def test_no_later_prompt_begins_in_the_place_of_one_that_cannot_but_those_begun_still_run():
    long, short, begun = prompt(1000), prompt(16), prompt(64, done=32)
    view = FakeView(waiting=[long, short], prefilling=[begun], free_blocks=20)
    assert fill(view, 500, [(long, True), (short, True), (begun, False)]) == [(begun, 32)]


def test_a_prompt_begun_uses_the_rest_of_its_last_block_when_none_is_free():
    begun = prompt(100, done=24)
    assert fill(FakeView(prefilling=[begun], free_blocks=0), 500) == [(begun, 8)]


def test_blocks_are_kept_for_the_decodes_that_will_need_one():
    begun = prompt(1000)
    view = FakeView(prefilling=[begun], decodes=[decode() for _ in range(32)], free_blocks=10)
    assert fill(view, 500) == [(begun, 8 * 16)]


def test_whole_splits_only_the_first_prompt():
    long, short = prompt(900), prompt(100)
    assert fill(FakeView(waiting=[long, short]), 500, whole=True) == [(long, 500)]
    assert fill(FakeView(waiting=[short, long]), 500, whole=True) == [(short, 100)]


def test_a_limit_under_what_a_prompt_could_have_ends_the_filling():
    first, second = prompt(100), prompt(100)
    view = FakeView(waiting=[first, second])
    assert fill(view, 500, allow=lambda work, most: most - 1) == [(first, 99)]
    assert fill(view, 500, allow=lambda work, most: 0) == []


# Whom blocks alone kept out


def blocked(*args, **options):
    return module.fill(*args, **options).blocked


def test_who_lacks_nothing_but_blocks_is_told_with_the_tokens_left():
    begun, long, short = prompt(160, done=80), prompt(400), prompt(16)
    view = FakeView(waiting=[long, short], prefilling=[begun], free_blocks=20)
    assert blocked(view, 500) == (long, 420)
    assert blocked(view, 500, [(long, True), (short, True), (begun, False)]) == (long, 420)


def test_without_a_seat_tokens_or_time_nobody_is_blocked():
    begun, long = prompt(160, done=80), prompt(400)
    view = FakeView(waiting=[long], prefilling=[begun], free_blocks=20)
    assert blocked(view, 80) is None
    assert blocked(view, 500, allow=lambda work, most: most - 1) is None
    assert blocked(FakeView(waiting=[long], free_seats=0, free_blocks=20), 500) is None
    assert blocked(FakeView(waiting=[prompt(100)], free_blocks=20), 500) is None


def test_nobody_comes_in_where_blocks_are_short_for_those_begun():
    begun, long = prompt(160, done=80), prompt(400)
    assert blocked(FakeView(waiting=[long], prefilling=[begun], free_blocks=4), 500) is None
