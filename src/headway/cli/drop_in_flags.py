"""The flags of other routers that are taken here without effect, and how many words follow each.

Read off `vllm-router --help` (0.1.17) and `smg launch --help` (1.13.0).
"""

__all__ = ["ANY", "IDLE", "NONE", "ONE", "SOME"]

# How many words follow a flag: none, one, any number, at least one.
NONE, ONE, ANY, SOME = "0", "1", "*", "+"

#: Flags that are taken and do nothing.
IDLE: dict[str, str] = {
    flag: words
    for words, flags in {
        NONE: """
            --enable-program-scheduling --mini-lb --enable-igw --service-discovery --disable-circuit-breaker
            --upstream-http2 --worker-overload-protection --disable-worker-overload-protection
            --worker-overload-shed --dp-aware --routing-key-override --sticky-sessions
            --dp-minimum-tokens-scheduler --enable-rl --disable-load-monitoring --mm-pixel-rdma
            --mm-allow-private-media-hosts --log-mm-timing --trust-tenant-header --priority-scheduler-enabled
            --tenant-rate-limit-enabled --disable-health-check --remove-unhealthy-workers
            --no-remove-unhealthy-workers --worker-auto-recovery --no-worker-auto-recovery
            --disable-tokenizer-autoload --tokenizer-cache-enable-l0 --tokenizer-cache-enable-l1 --enable-wasm
            --oracle-external-auth --enable-trace --control-plane-audit-enabled --enable-mesh""",
        ONE: """
            --program-scheduling-config-json --router-temperature --kv-penalty-host --kv-penalty-external
            --kv-penalty-disk --kv-aware-session-affinity-ttl-secs --kv-event-source
            --kv-event-replay-source --kv-event-block-size --kv-event-model --pd-kv-events
            --worker-startup-timeout-secs --worker-startup-check-interval --worker-startup-delay
            --cache-threshold --cache-match-threshold --balance-abs-threshold --spill-abs-threshold
            --balance-rel-threshold --spill-rel-threshold --eviction-interval-secs --max-tree-size
            --wasm-middleware --wasm-middleware-sha256 --wasm-middleware-route --log-dir
            --service-discovery-port --service-discovery-namespace --vllm-discovery-address
            --retry-initial-backoff-ms --retry-max-backoff-ms --retry-backoff-multiplier
            --retry-jitter-factor --cb-timeout-duration-secs --cb-window-duration-secs
            --upstream-pool-idle-timeout-secs --health-check-port --encode-policy --prefix-token-count
            --prefix-hash-load-factor --prefix-hash-balance-abs-threshold --least-load-kv-pressure-weight
            --least-load-default-throughput --least-load-mean-prefill-tokens
            --least-load-max-waiting-requests --power-of-two-load-metric --balance-token-usage-threshold
            --overload-token-usage-threshold --worker-overload-waiting-requests --worker-overload-token-usage
            --kv-index --worker-stall-secs --worker-wedge-secs --worker-stale-secs --worker-warmup-secs
            --worker-warmup-share --worker-warmup-blocks --worker-warmup-thin-ratio
            --worker-warmup-divert-every --selection-policy --selection-accounting-ttl-ms --overlap-decay
            --selection-temperature --bucket-adjust-interval-secs --block-size --cache-boundaries
            --cache-index --cache-ttl-secs --max-idle-secs --sticky-key-idle-secs --assignment-mode
            --max-buffered-request-bytes --pd-admission-wait-secs --sse-keepalive-secs
            --rl-control-timeout-secs --rl-fanout-concurrency --prefill-max-inflight-requests-per-worker
            --prefill-queue-size --prefill-queue-timeout-secs --job-queue-capacity --job-queue-concurrency
            --load-monitor-interval --multimodal-tensor-transport --multimodal-shm-min-bytes
            --multimodal-max-inflight-bytes --mm-per-request-image-limit --mm-processing --mm-pixel-cache-mb
            --mm-allowed-media-domains --rdma-listen-ip --rdma-slot-ttl-s --discovery-provider
            --discovery-file --discovery-check-interval-secs --kv-connector-annotation
            --kv-engine-id-annotation --model-id-from --model-alias --jemalloc-prof-dir
            --idle-connection-timeout-secs --tenant-header-name --max-background-responses
            --priority-scheduler-default-max-class --priority-scheduler-config
            --priority-scheduler-tenant-metric-top-n --tenant-rate-limit-config --model-path --model
            --chat-template --parser --tokenizer-cache-l0-max-entries --tokenizer-cache-l0-max-memory
            --tokenizer-cache-l1-max-memory --reasoning-parser --tool-call-parser --mcp-config-path
            --zmq-engine-count --storage-hook-wasm-path --history-backend --history-memory-max-responses
            --history-memory-max-items --history-memory-retention-secs --oracle-wallet-path
            --oracle-tns-alias --oracle-connect-descriptor --oracle-username --oracle-password
            --oracle-pool-min --oracle-pool-max --oracle-pool-timeout-secs --postgres-db-url
            --postgres-pool-max --postgres-op-timeout-secs --redis-url --redis-pool-max
            --redis-retention-days --redis-op-timeout-secs --schema-config --client-cert-path
            --client-key-path --otlp-traces-endpoint --tenant-api-key --jwt-issuer --jwt-audience
            --jwt-jwks-uri --mesh-server-name --mesh-host --mesh-advertise-host --mesh-port
            --mesh-tls-ca-cert --mesh-tls-cert --mesh-tls-key""",
        ANY: """
            --request-id-headers --cors-allowed-origins --routing-key-headers --storage-context-headers
            --ca-cert-paths --control-plane-api-keys --jwt-role-mapping --mesh-peer-urls""",
        SOME: """
            --selector --prefill-selector --decode-selector --encode-selector --router-selector
            --prometheus-duration-buckets""",
    }.items()
    for flag in flags.split()
}
