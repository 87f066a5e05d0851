"""Answer what concerns the gateway itself: whether it lives and can serve, its metrics, and the models."""

from collections import Counter
from collections.abc import Callable

from headway.front.access import Gate
from headway.front.admin import metrics_page
from headway.front.errors import model_not_found
from headway.front.lease import Elector
from headway.front.metrics import Metrics
from headway.front.protocol import HttpRequest, HttpResponse, Routes, json_answer
from headway.front.workers import Workers

__all__ = ["OwnPages"]

_MODELS = "/v1/models"


class OwnPages:
    """Handlers of these paths. They raise Refusal. `draining`: whether the gateway takes nothing new."""

    def __init__(
        self,
        workers: Workers,
        elector: Elector,
        metrics: Metrics,
        metrics_gate: Gate,
        draining: Callable[[], bool],
    ) -> None:
        self.routes: Routes = {
            **{
                (method, path): self._health
                for method in ("GET", "HEAD")
                for path in ("/health", "/liveness")
            },
            **{
                (method, path): self._ready for method in ("GET", "HEAD") for path in ("/ready", "/readiness")
            },
            **{(method, "/health_generate"): self._ready for method in ("GET", "HEAD")},
            **{(method, "/ping"): self._ready for method in ("GET", "POST")},
            ("GET", "/metrics"): self._metrics,
            ("GET", _MODELS): self._models,
        }
        self._workers = workers
        self._elector = elector
        self._counts = metrics
        self._metrics_gate = metrics_gate
        self._draining = draining

    async def model(self, request: HttpRequest) -> HttpResponse:
        """Describe the one model whose name ends the path. Raises Refusal (404) when there is none."""
        name, cards = request.path.removeprefix(f"{_MODELS}/"), self._workers.catalog.cards()
        if name not in cards:
            raise model_not_found(name)
        return json_answer(cards[name].described())

    async def _models(self, request: HttpRequest) -> HttpResponse:
        cards = self._workers.catalog.cards()
        return json_answer({"object": "list", "data": [cards[name].described() for name in sorted(cards)]})

    async def _health(self, request: HttpRequest) -> HttpResponse:
        return json_answer({"status": "ok"})

    async def _ready(self, request: HttpRequest) -> HttpResponse:
        ready = self._workers.ready() and self._elector.leads() and not self._draining()
        answer: dict[str, object] = {"ready": ready}
        answer["workers"] = Counter(worker.state.value for worker in self._workers)
        if self._elector.shared:
            answer["leader"] = self._elector.standing()
        return json_answer(answer, 200 if ready else 503)

    async def _metrics(self, request: HttpRequest) -> HttpResponse:
        return metrics_page(self._metrics_gate, self._counts, request)
