"""A thousand streams at once, and clients that leave: nothing lost, nothing twice, nothing left behind."""

from loaded import loaded, run, until

HELD = 1000


def test_a_thousand_streams_are_held_and_then_each_is_served_once(tmp_path):
    async def check():
        async with loaded(tmp_path) as load:
            for engine in load.engines:  # no pass ends before all have been asked
                await load.fault(engine, kind="slow", factor=100)
            # What the engines take although they are busy is not held.
            asked = load.ask(HELD + 100, tokens=5)
            await until(lambda: len(load.held()) >= HELD, "a thousand held")
            assert not any(each.begun for each in asked)
            for engine in load.engines:
                await load.fault(engine, kind="none")
            await load.answered()
            assert [each.id for each in asked if not each.whole] == []
            assert len({mark(each) for each in asked}) == len(asked)  # each has its own answer
            sent = load.sent()
            assert len(sent) == len(asked) and all(len(tries) == 1 for tries in sent.values())

    run(check())


def mark(asked):
    """What the engine made of the prompt."""
    return asked.body.partition(b'"system_fingerprint":"')[2][:11]


def test_half_of_the_clients_leave_and_their_requests_are_gone_everywhere(tmp_path):
    async def check():
        async with loaded(tmp_path) as load:
            streaming = load.ask(40, tokens=80)
            await until(lambda: all(each.begun for each in streaming), "forty streams")
            for engine in load.engines:
                await load.fault(engine, kind="slow", factor=20)
            asked = streaming + load.ask(160)
            await until(lambda: load.front.driver.requests == len(asked) and len(load.held()) > 40)
            held = load.held()
            gone, stay = asked[::2], asked[1::2]
            for each in gone:
                each.task.cancel()
            await until(lambda: load.front.driver.requests == len(stay), "the gateway to notice")
            before = load.sent().keys()
            for engine in load.engines:
                await load.fault(engine, kind="none")
            await load.answered(stay)
            assert all(each.whole for each in stay)
            sent = load.sent()
            assert not (sent.keys() - before) & {each.id for each in gone}
            assert all(len(tries) == 1 for tries in sent.values())
            assert any(each.begun for each in gone) and any(each.id in held for each in gone)

    run(check())
