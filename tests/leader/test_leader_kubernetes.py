"""The lease in a Kubernetes Lease, with clocks of literal times."""

import pytest
from fake_leases import FakeLeases
from standins import run

from headway.core.leadership import Claim
from headway.front.discovery.api import Api
from headway.front.lease.contract import Granted, StoreError, Taken
from headway.front.lease.kubernetes import FENCE_ANNOTATION, KubernetesStore

#: 2026-11-24T10:00:00Z, in ms where a first token begins.
NOW_S = 1795514400
FIRST = NOW_S * 1000


class Stores:
    """Two replicas, each with a monotonic clock of its own (`at`), and one wall clock for both."""

    def __init__(self, lease_s=5.0):
        self.at = {"a": 1000.0, "b": 70.0}
        self.wall_s = NOW_S
        self.lease_s = lease_s

    async def __aenter__(self):
        self.server = await FakeLeases().__aenter__()
        self.a, self.b = self._store("a"), self._store("b")
        return self

    async def __aexit__(self, *_):
        await self.a.close()
        await self.b.close()
        await self.server.__aexit__()

    def _store(self, name):
        api = Api(self.server.url, token_file=None, ca_file=None)
        return KubernetesStore(
            api,
            "inference",
            "headway-llama",
            name,
            self.lease_s,
            clock=lambda: self.at[name],
            wall=lambda: self.wall_s,
        )

    def wait(self, seconds):
        for name in self.at:
            self.at[name] += seconds
        self.wall_s += seconds


def claim(above=0):
    return Claim(1, 0.0, above)


def test_the_first_makes_the_lease_and_keeps_its_token():
    async def test():
        async with Stores(lease_s=4.2) as stores:
            assert await stores.a.claim(claim()) == Granted(FIRST)
            spec = stores.server.only()["spec"]
            assert spec == {
                "holderIdentity": "a",
                "leaseDurationSeconds": 5,
                "acquireTime": "2026-11-24T10:00:00.000000Z",
                "renewTime": "2026-11-24T10:00:00.000000Z",
                "leaseTransitions": 0,
            }
            stores.wait(2.5)
            assert await stores.a.claim(claim()) == Granted(FIRST)
            spec = stores.server.only()["spec"]
            assert (spec["acquireTime"], spec["renewTime"]) == (
                "2026-11-24T10:00:00.000000Z",
                "2026-11-24T10:00:02.500000Z",
            )

    run(test())


def test_a_follower_counts_from_when_it_saw_the_lease_as_it_is():
    """Whatever the times in it say: those are of another clock."""

    async def test():
        async with Stores() as stores:
            await stores.a.claim(claim())
            stores.wait(3.0)
            assert await stores.b.claim(claim()) == Taken("a", 5.0)
            stores.wait(4.0)
            assert await stores.b.claim(claim()) == Taken("a", 1.0)
            await stores.a.claim(claim())
            assert await stores.b.claim(claim()) == Taken("a", 5.0)
            stores.wait(5.0)
            assert await stores.b.claim(claim()) == Granted(FIRST + 12_000)
            spec = stores.server.only()["spec"]
            assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 1)
            assert await stores.a.claim(claim()) == Taken("b", 5.0)

    run(test())


def test_of_two_that_see_it_run_out_one_gets_it():
    async def test():
        async with Stores() as stores:
            await stores.a.claim(claim())
            await stores.b.claim(claim())
            stores.wait(6.0)

            def renewed():  # between b's look and its write
                stores.server.edit(annotations={FENCE_ANNOTATION: str(FIRST)})

            stores.server.before_write = renewed
            assert await stores.b.claim(claim()) == Taken("a", 5.0)

    run(test())


def test_somebody_who_edits_the_lease_does_not_cost_the_leader_its_term():
    async def test():
        async with Stores() as stores:
            await stores.a.claim(claim())
            annotations = {FENCE_ANNOTATION: str(FIRST), "note": "hello"}
            stores.server.before_write = lambda: stores.server.edit(
                annotations=annotations, labels={"app": "x"}
            )
            assert await stores.a.claim(claim()) == Granted(FIRST)
            metadata = stores.server.only()["metadata"]
            assert (metadata["annotations"], metadata["labels"]) == (annotations, {"app": "x"})

    run(test())


def test_a_write_whose_answer_is_lost_is_found_by_the_next_look():
    async def test():
        async with Stores() as stores:
            stores.server.lose = True
            with pytest.raises(StoreError):
                await stores.a.claim(claim())
            assert await stores.b.claim(claim()) == Taken("a", 5.0)
            assert await stores.a.claim(claim()) == Granted(FIRST)

    run(test())


def test_tokens_grow_over_a_lease_that_was_deleted_and_over_what_engines_have_seen():
    async def test():
        async with Stores() as stores:
            await stores.a.claim(claim())
            stores.server.leases.clear()
            stores.wait(0.25)
            assert await stores.b.claim(claim()) == Granted(FIRST + 250)
            assert await stores.b.claim(claim(above=FIRST + 900)) == Granted(FIRST + 901)
            assert await stores.b.claim(claim(above=FIRST + 900)) == Granted(FIRST + 901)

    run(test())


def test_a_lease_that_others_made_is_taken_over_as_it_is():
    async def test():
        async with Stores() as stores:
            await stores.a.claim(claim())
            lease = stores.server.only()
            stores.server.leases["inference", "headway-llama"] = lease | {
                "metadata": {"name": "headway-llama", "resourceVersion": "7"},
                "spec": {"holderIdentity": "x", "leaseTransitions": 3, "strategy": "OldestEmulationVersion"},
            }
            assert await stores.b.claim(claim()) == Taken("x", 5.0)
            stores.wait(5.0)
            assert await stores.b.claim(claim()) == Granted(FIRST + 5000)
            spec = stores.server.only()["spec"]
            assert (spec["leaseTransitions"], spec["strategy"]) == (4, "OldestEmulationVersion")

    run(test())


def test_given_back_it_is_free_at_once():
    async def test():
        async with Stores() as stores:
            await stores.a.claim(claim())
            await stores.b.release(FIRST)  # it is not b's to give
            assert await stores.b.claim(claim()) == Taken("a", 5.0)
            await stores.a.release(FIRST)
            assert await stores.b.claim(claim()) == Granted(FIRST + 1)

    run(test())


@pytest.mark.parametrize(
    ("refuse", "told"),
    [
        ((403, "leases.coordination.k8s.io is forbidden"), "403 leases.coordination.k8s.io is forbidden"),
        ((500, "etcd is gone"), "500 etcd is gone"),
    ],
)
def test_what_the_server_says_against_it_is_told(refuse, told):
    async def test():
        async with Stores() as stores:
            stores.server.refuse = refuse
            with pytest.raises(StoreError, match=told):
                await stores.a.claim(claim())

    run(test())


def test_what_is_no_lease_is_told():
    async def test():
        async with Stores() as stores:
            stores.server.leases["inference", "headway-llama"] = {"metadata": 7}
            with pytest.raises(StoreError, match="the lease 'headway-llama' is not one"):
                await stores.a.claim(claim())

    run(test())
