"""Decides what a cluster file may say: pools of instances, their costs and memory, the network between them.

    name = "mine"
    kv_bytes_per_token = 70272
    [slo]
    ttft_s = 2.0
    [[pools]]
    role = "prefill"                  # or decode, aggregated
    instances = 3
    ranks = 8
    costs = "dsv3-h200-ep8"           # a calibrated name, or a table with form = "dense" | "lockstep"
    memory = { gpu_memory_gb = 141, shared_weights_gb = 17, expert_weights_gb = 653.9 }

Unknown keys are refused with the nearest known one. Memory figures are in GB of 10⁹ bytes.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from headway.core.complaints import Location, complaint, key_path
from headway.core.errors import ConfigError, unknown_name
from headway.core.events import InstanceUp, Role
from headway.core.request import Slo
from headway.model.costs import Costs, DenseCosts, LockstepCosts, PhaseCosts
from headway.model.fits import FITTED

__all__ = ["ClusterSpec", "MemorySpec", "NetworkSpec", "PoolSpec"]

_GB = 1e9
_INSTANCE_PREFIX = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.AGGREGATED: "engine"}


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NetworkSpec(_Spec):
    """What lies between client, scheduler, prefill and decode. `answer_latency_s`: from an engine's token to
    the client; no policy sees it. `kv_bandwidth_bytes_s`: of one KV transfer.
    """

    dispatch_latency_s: float = Field(default=0.001, ge=0)
    report_latency_s: float = Field(default=0.001, ge=0)
    answer_latency_s: float = Field(default=0.0, ge=0)
    kv_bandwidth_bytes_s: float = Field(default=50e9, gt=0)
    kv_latency_s: float = Field(default=0.002, ge=0)


class MemorySpec(_Spec):
    """A rank's memory, from which its KV follows.

    Weights are `weights_gb_per_gpu`, or `shared_weights_gb` (on every GPU) and `expert_weights_gb` (spread
    over the instance's ranks). `reserve_gb` is for activations and buffers.
    """

    gpu_memory_gb: float = Field(gt=0)
    memory_utilisation: float = Field(default=0.9, gt=0, le=1)
    weights_gb_per_gpu: float | None = Field(default=None, ge=0)
    shared_weights_gb: float = Field(default=0.0, ge=0)
    expert_weights_gb: float = Field(default=0.0, ge=0)
    reserve_gb: float = Field(default=4.0, ge=0)

    def weights_gb(self, expert_ranks: int) -> float:
        """Return what the weights take on one GPU."""
        if self.weights_gb_per_gpu is not None:
            return self.weights_gb_per_gpu
        return self.shared_weights_gb + self.expert_weights_gb / expert_ranks

    def kv_blocks(self, expert_ranks: int, block_bytes: float) -> int:
        """Return a rank's KV blocks. Raises ConfigError, with the numbers, when the model does not fit."""
        usable = self.gpu_memory_gb * self.memory_utilisation
        weights = self.weights_gb(expert_ranks)
        blocks = int((usable - weights - self.reserve_gb) * _GB / block_bytes)
        if blocks < 1:
            raise ConfigError(
                f"cannot hold the model: {weights:.1f} GB of weights and {self.reserve_gb:g} GB of reserve "
                f"per GPU leave no KV in {usable:.1f} GB "
                f"({self.memory_utilisation:g} of {self.gpu_memory_gb:g} GB)"
            )
        return blocks


def _named_costs(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in FITTED:
        raise ValueError(unknown_name("costs", value, FITTED))
    return FITTED[value]


class PoolSpec(_Spec):
    """Equal instances. `token_cap`, `max_running` and `kv_blocks` are per rank, `jitter` is relative.

    `token_cap`: most new tokens of a pass (chunk). `kv_blocks` may be left to the cluster to work out from
    `memory`. `host_gap_s`: between two passes, added to each. `jitter`: standard deviation of a pass time
    over its mean.
    """

    role: Role
    instances: int = Field(default=1, ge=1)
    ranks: int = Field(default=1, ge=1)
    lockstep: bool = True
    token_cap: int = Field(ge=1)
    max_running: int = Field(default=256, ge=1)
    kv_blocks: int = Field(default=0, ge=0)
    block_tokens: int = Field(default=16, ge=1)
    costs: Annotated[Costs, BeforeValidator(_named_costs), Field(discriminator="form")]
    memory: MemorySpec | None = None
    host_gap_s: float = Field(default=0.001, ge=0)
    jitter: float = Field(default=0.02, ge=0, le=0.5)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.kv_blocks and self.memory is None:
            raise ValueError("needs kv_blocks, or memory to work them out from")
        if self.role is not Role.PREFILL and self.token_cap < self.max_running:
            raise ValueError(f"token_cap {self.token_cap} is below max_running {self.max_running}")
        return self

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits on a rank."""
        return self.kv_blocks * self.block_tokens

    def instance_names(self) -> list[str]:
        """Return the names of the instances, in order."""
        return [f"{_INSTANCE_PREFIX[self.role]}-{number}" for number in range(self.instances)]

    def instance_up(self, name: str, epoch: int) -> InstanceUp:
        """Return the event that introduces an instance to a policy."""
        return InstanceUp(
            instance=name,
            role=self.role,
            ranks=self.ranks,
            chunk_tokens=self.token_cap,
            kv_blocks=self.kv_blocks,
            block_tokens=self.block_tokens,
            max_running=self.max_running,
            lockstep=self.lockstep,
            epoch=epoch,
        )


class ClusterSpec(_Spec):
    """A cluster: one aggregated pool, or a prefill and a decode pool. `source`: what its numbers rest on."""

    name: str
    source: str = ""
    slo: Slo = Slo()
    kv_bytes_per_token: float = Field(gt=0)
    network: NetworkSpec = NetworkSpec()
    pools: tuple[PoolSpec, ...]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        roles = sorted(pool.role.value for pool in self.pools)
        if roles not in (["aggregated"], ["decode", "prefill"]):
            have = ", ".join(roles) or "none"
            raise ValueError(
                f"a cluster has one aggregated pool, or a prefill and a decode pool, not: {have}"
            )
        pools = tuple(self._with_kv(index, pool) for index, pool in enumerate(self.pools))
        object.__setattr__(self, "pools", pools)
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str) -> Self:
        """Build from plain data. Raises ConfigError: one line with `where`, key path, nearest known key."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise complaint(error.errors(), _known_keys, where=where, path_of=_path) from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a cluster file. Raises ConfigError as `parse` does, and when the file is no readable TOML."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the cluster file: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        return cls.parse({"name": Path(path).stem, "source": str(path)} | data, where=str(path))

    @property
    def disaggregated(self) -> bool:
        """Whether prefill and decode are pools of their own."""
        return len(self.pools) == 2

    def pool(self, role: Role) -> PoolSpec:
        """Return the pool of a role. Raises ConfigError when the cluster has none."""
        for pool in self.pools:
            if pool.role is role:
                return pool
        raise ConfigError(f"cluster {self.name} has no {role.value} pool")

    def with_pool(self, role: Role, **changes: Any) -> Self:
        """Return a copy with fields of one pool changed; its KV follows again from its memory, if given."""
        data = {name: getattr(self, name) for name in type(self).model_fields}
        data["pools"] = [_changed(pool, changes) if pool is self.pool(role) else pool for pool in self.pools]
        return self.parse(data, where=f"cluster {self.name}")

    def kv_transfer_s(self, tokens: int) -> float:
        """Return how long the KV of `tokens` takes from a prefill to a decode instance."""
        return (
            self.network.kv_latency_s + tokens * self.kv_bytes_per_token / self.network.kv_bandwidth_bytes_s
        )

    def _with_kv(self, index: int, pool: PoolSpec) -> PoolSpec:
        if pool.kv_blocks or pool.memory is None:
            return pool
        try:
            expert_ranks = pool.ranks if pool.lockstep else 1
            blocks = pool.memory.kv_blocks(expert_ranks, self.kv_bytes_per_token * pool.block_tokens)
        except ConfigError as error:
            raise ConfigError(f"pools[{index}] ({pool.role.value}): {error}") from None
        return pool.model_copy(update={"kv_blocks": blocks})


def _changed(pool: PoolSpec, changes: Mapping[str, Any]) -> dict[str, Any]:
    data = {name: getattr(pool, name) for name in PoolSpec.model_fields}
    if pool.memory is not None:
        data["kv_blocks"] = 0
    return data | dict(changes)


_KNOWN_KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(ClusterSpec.model_fields),
    "slo": tuple(field.name for field in fields(Slo)),
    "network": tuple(NetworkSpec.model_fields),
    "pools": tuple(PoolSpec.model_fields),
    "memory": tuple(MemorySpec.model_fields),
    "dense": tuple(field.name for field in fields(DenseCosts)),
    "lockstep": tuple(field.name for field in fields(LockstepCosts)),
    **dict.fromkeys(("prefill", "decode", "mixed"), tuple(field.name for field in fields(PhaseCosts))),
}


def _path(loc: Location) -> str:
    """Write a location without the form of its costs, which the validator puts there."""
    at = next((index for index, part in enumerate(loc) if part == "costs"), len(loc))
    return key_path([*loc[: at + 1], *loc[at + 2 :]])


def _known_keys(table: Location) -> tuple[str, ...]:
    return _KNOWN_KEYS[next((str(part) for part in reversed(table) if part in _KNOWN_KEYS), "")]
