"""Two pools for engines that want prefill and decode at once (SGLang P/D): both are placed at dispatch.

The policies are the very objects that `Disaggregated` drives one after the other; only the moment at
which a request arrives in the decode pool differs. There it is the end of the prefill. Here it is the
prefill's dispatch, because SGLang's decode server must take part in the hand-over from the start (it
allocates the KV that the prefill server writes into). The decode policy so decides earlier than it could,
on older news: the price of the protocol.

A request's legs are sent when both are placed. It is in both pools until it finishes; a leg that fails or is
recalled before the first byte takes the other one with it, and the request starts anew in the prefill pool.
"""

from headway.core.actions import Action, Dispatch, Recall, Reject
from headway.core.cluster.compose import Disaggregated
from headway.core.events import Arrived, Cancelled, Event, Failed, Finished, PrefillDone
from headway.core.request import Request

__all__ = ["Paired"]


class Paired(Disaggregated):
    """See the module's docstring. `decoding` here means: known to the decode pool, which is from its
    dispatch on.
    """

    def handle(self, event: Event, now: float) -> list[Action]:
        """See `ClusterPolicy.handle`."""
        match event:
            case PrefillDone():
                actions = self._both(event, now)
            case Cancelled(request_id) | Finished(request_id):
                self._forget(request_id)
                actions = self._both(event, now)
            case Failed(request_id):
                actions = self._both_failed(event, request_id, now)
            case _:
                actions = super().handle(event, now)
        return self._pair(actions, now)

    def _both(self, event: Event, now: float) -> list[Action]:
        """Tell both pools. What a request leaves may be given to others at once: no action may be lost."""
        return self.prefill.handle(event, now) + self.decode.handle(event, now)

    def _both_failed(self, event: Failed, request_id: str, now: float) -> list[Action]:
        """Give back both places; a request that may be retried waits for a prefill again."""
        request = self._requests.get(request_id)
        actions = self._both(Cancelled(request_id), now)
        self._decoding.discard(request_id)
        if request is None or not event.retry:
            self._forget(request_id)
            return actions
        return actions + self.prefill.handle(Arrived(request), now)

    def _pair(self, actions: list[Action], now: float) -> list[Action]:
        """Follow each action of one pool with what it means for the other."""
        paired: list[Action] = []
        for action in actions:
            paired.append(action)
            if isinstance(action, Dispatch) and self._is_prefill(action):
                paired += self._place_decode(action.request_id, now)
            elif isinstance(action, Recall):
                paired += self._recalled(action, now)
            elif isinstance(action, Reject):
                paired += self._refused(action.request_id, now)
        return paired

    def _place_decode(self, request_id: str, now: float) -> list[Action]:
        self._decoding.add(request_id)
        actions = self.decode.handle(Arrived(self._requests[request_id]), now)
        if any(isinstance(action, Reject) for action in actions):
            actions = actions + self._refused(request_id, now)
        return self._note(actions)

    def _recalled(self, action: Recall, now: float) -> list[Action]:
        """Withdraw the decode leg of a recalled prefill leg, and the other way round."""
        request = self._requests.get(action.request_id)
        if self._is_prefill(action):
            self._decoding.discard(action.request_id)
            return self.decode.handle(Cancelled(action.request_id), now)
        actions = self._both(Cancelled(action.request_id), now)
        self._decoding.discard(action.request_id)
        if request is not None:
            actions = actions + self.prefill.handle(Arrived(request), now)
        return self._pair(actions, now)

    def _is_prefill(self, action: Dispatch | Recall) -> bool:
        return self._pool_of.get(action.instance) is self.prefill

    def _refused(self, request_id: str, now: float) -> list[Action]:
        """Give back what a refused request holds in either pool."""
        self._forget(request_id)
        return self._pair(self._both(Cancelled(request_id), now), now)

    def _arrived(self, event: Arrived, request: Request, now: float) -> list[Action]:
        if not self.decode.ledger.fits(request):
            return self.decode.handle(event, now)
        self._requests[request.id] = request
        return self.prefill.handle(event, now)
