"""The flags of other routers that are taken here without effect, and those that are refused.

Read off `vllm-router --help` (0.1.17) and `smg launch --help` (1.13.0). A flag that decides who gets in or
where requests go is never taken without effect: what it would keep out would get in.
"""

__all__ = ["ANY", "IDLE", "NONE", "NOTES", "ONE", "REFUSED", "SOME"]

# How many words follow a flag: none, one, any number, at least one.
NONE, ONE, ANY, SOME = "0", "1", "*", "+"

_JWT = "JSON web tokens are not checked here: give clients keys with limits in [auth] keys_file"
_TENANTS = "tenants are not told apart here: give each a key with limits in [auth] keys_file"
_WASM = "WebAssembly filters do not run here, so what they stop would get through"
_AFFINITY = "sessions do not stick to engines here; the default policy goes by cached prefixes"
_CERTIFICATE = "client certificates are not sent to engines here"
_FILE = "this file's format is not read here: name engines by --worker-urls, or use [discovery] file"

#: Flags that are refused: how many words follow each, and why.
REFUSED: dict[str, tuple[str, str]] = {
    # Who gets in
    "--jwt-issuer": (ONE, _JWT),
    "--jwt-audience": (ONE, _JWT),
    "--jwt-jwks-uri": (ONE, _JWT),
    "--jwt-role-mapping": (ANY, _JWT),
    "--tenant-api-key": (ONE, _TENANTS),
    "--trust-tenant-header": (NONE, _TENANTS),
    "--tenant-rate-limit-enabled": (NONE, _TENANTS),
    "--tenant-rate-limit-config": (ONE, _TENANTS),
    "--priority-scheduler-enabled": (
        NONE,
        "classes of priority are not read here: give keys a priority in [auth] keys_file",
    ),
    "--wasm-middleware": (ONE, _WASM),
    "--enable-wasm": (NONE, _WASM),
    "--storage-hook-wasm-path": (ONE, _WASM),
    "--control-plane-audit-enabled": (NONE, "there is no audit log here, only the log of every change"),
    "--client-cert-path": (ONE, _CERTIFICATE),
    "--client-key-path": (ONE, _CERTIFICATE),
    "--ca-cert-paths": (
        ANY,
        "CAs are not named by flags here: set the environment variable SSL_CERT_FILE",
    ),
    "--mm-allowed-media-domains": (
        ONE,
        "engines fetch media here, not the gateway: set their --allowed-media-domains",
    ),
    # Where requests go
    "--epd-disaggregation": (NONE, "there is no encode pool here, only prefill and decode"),
    "--encode": (SOME, "there is no encode pool here, only prefill and decode"),
    "--encode-selector": (SOME, "there is no encode pool here, only prefill and decode"),
    "--router-selector": (SOME, "replicas do not look for each other by labels here: see [leader]"),
    "--enable-mesh": (NONE, "replicas share no state here, but one of them leads: see [leader]"),
    "--vllm-discovery-address": (
        ONE,
        "engines do not register here: name them by --prefill and --decode, or use --service-discovery",
    ),
    "--discovery-file": (ONE, _FILE),
    "--discovery-check-interval-secs": (ONE, _FILE),
    "--model-id-from": (ONE, "models are called here what engines call them"),
    "--model-alias": (ONE, "models have no aliases here: give engines several --served-model-name"),
    "--routing-key-override": (NONE, _AFFINITY),
    "--sticky-sessions": (NONE, _AFFINITY),
    "--routing-key-headers": (ANY, _AFFINITY),
    "--kv-aware-session-affinity-ttl-secs": (ONE, _AFFINITY),
    "--enable-program-scheduling": (NONE, "programs are not scheduled as a whole here"),
    "--disable-health-check": (
        NONE,
        "an engine gets work here only after a check: name a path it answers by --health-check-endpoint",
    ),
    "--health-check-port": (
        ONE,
        "probes are answered on --port here: /health, /liveness, /readiness",
    ),
}

_AT_ONCE = "has no effect here: a retry goes to another engine at once"
_JOINS = "has no effect here: an engine joins when it passes a check, whenever that is"

#: What is said about flags without effect where there is more to say than that.
NOTES: dict[str, str] = {
    "--enable-igw": "has no effect here: engines are always chosen by the models they serve",
    "--retry-initial-backoff-ms": _AT_ONCE,
    "--retry-max-backoff-ms": _AT_ONCE,
    "--retry-backoff-multiplier": _AT_ONCE,
    "--retry-jitter-factor": _AT_ONCE,
    "--cb-window-duration-secs": "has no effect here: failures in a row are counted, without a window",
    "--worker-startup-check-interval": _JOINS,
    "--worker-startup-delay": _JOINS,
}

#: Flags that are taken and do nothing.
IDLE: dict[str, str] = {
    flag: words
    for words, flags in {
        NONE: """
            --mini-lb --enable-igw --upstream-http2 --worker-overload-protection
            --disable-worker-overload-protection --worker-overload-shed --dp-minimum-tokens-scheduler
            --enable-rl --disable-load-monitoring --mm-pixel-rdma --mm-allow-private-media-hosts
            --log-mm-timing --remove-unhealthy-workers --no-remove-unhealthy-workers
            --worker-auto-recovery --no-worker-auto-recovery --disable-tokenizer-autoload
            --tokenizer-cache-enable-l0 --tokenizer-cache-enable-l1 --oracle-external-auth --enable-trace""",
        ONE: """
            --program-scheduling-config-json --router-temperature --kv-penalty-host --kv-penalty-external
            --kv-penalty-disk --kv-event-source --kv-event-replay-source --kv-event-block-size
            --kv-event-model --pd-kv-events --worker-startup-check-interval
            --worker-startup-delay --cache-threshold --cache-match-threshold --balance-abs-threshold
            --spill-abs-threshold --balance-rel-threshold --spill-rel-threshold --eviction-interval-secs
            --max-tree-size --wasm-middleware-sha256 --wasm-middleware-route --log-dir
            --retry-initial-backoff-ms --retry-max-backoff-ms --retry-backoff-multiplier
            --retry-jitter-factor --cb-window-duration-secs
            --upstream-pool-idle-timeout-secs
            --encode-policy --prefix-token-count --prefix-hash-load-factor
            --prefix-hash-balance-abs-threshold --least-load-kv-pressure-weight
            --least-load-default-throughput --least-load-mean-prefill-tokens
            --least-load-max-waiting-requests --power-of-two-load-metric --balance-token-usage-threshold
            --overload-token-usage-threshold --worker-overload-waiting-requests
            --worker-overload-token-usage --kv-index --worker-stall-secs --worker-wedge-secs
            --worker-stale-secs --worker-warmup-secs --worker-warmup-share --worker-warmup-blocks
            --worker-warmup-thin-ratio --worker-warmup-divert-every --selection-policy
            --selection-accounting-ttl-ms --overlap-decay --selection-temperature
            --bucket-adjust-interval-secs --block-size --cache-boundaries --cache-index --cache-ttl-secs
            --max-idle-secs --sticky-key-idle-secs --assignment-mode --max-buffered-request-bytes
            --pd-admission-wait-secs --sse-keepalive-secs --rl-control-timeout-secs
            --rl-fanout-concurrency --prefill-max-inflight-requests-per-worker --prefill-queue-size
            --prefill-queue-timeout-secs --job-queue-capacity --job-queue-concurrency
            --load-monitor-interval --multimodal-tensor-transport --multimodal-shm-min-bytes
            --multimodal-max-inflight-bytes --mm-per-request-image-limit --mm-processing
            --mm-pixel-cache-mb --rdma-listen-ip --rdma-slot-ttl-s --kv-connector-annotation
            --kv-engine-id-annotation --jemalloc-prof-dir --idle-connection-timeout-secs
            --tenant-header-name --max-background-responses --priority-scheduler-default-max-class
            --priority-scheduler-config --priority-scheduler-tenant-metric-top-n --chat-template --parser
            --tokenizer-cache-l0-max-entries --tokenizer-cache-l0-max-memory
            --tokenizer-cache-l1-max-memory --reasoning-parser --tool-call-parser --mcp-config-path
            --zmq-engine-count --history-backend --history-memory-max-responses --history-memory-max-items
            --history-memory-retention-secs --oracle-wallet-path --oracle-tns-alias
            --oracle-connect-descriptor --oracle-username --oracle-password --oracle-pool-min
            --oracle-pool-max --oracle-pool-timeout-secs --postgres-db-url --postgres-pool-max
            --postgres-op-timeout-secs --redis-url --redis-pool-max --redis-retention-days
            --redis-op-timeout-secs --schema-config --otlp-traces-endpoint --mesh-server-name --mesh-host
            --mesh-advertise-host --mesh-port --mesh-tls-ca-cert --mesh-tls-cert --mesh-tls-key""",
        ANY: """
            --request-id-headers --storage-context-headers --mesh-peer-urls""",
        SOME: """
            --prometheus-duration-buckets""",
    }.items()
    for flag in flags.split()
}
