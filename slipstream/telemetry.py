"""Every metric of Slipstream, declared once, and the one way processes log.

Speculation counters follow vLLM's: proposed and accepted are draft tokens, `verification_passes` counts target passes
per request. Acceptance rate = accepted / proposed; acceptance length = 1 + accepted / passes. Label values are
bounded: domains beyond `MAX_DOMAINS` share the label `other`; a version appears only on `draft_info`.
"""

from __future__ import annotations

import logging
import sys
import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "slipstream"
MAX_DOMAINS = 16
MAX_POSITIONS = 16
OTHER_DOMAIN = "other"

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class DraftingMetrics:
    """What a budgeted drafter decides, and how well it knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.steps = Counter(
            "drafting_steps",
            "Steps by what drafted in them: off, floor, chain",
            ("mode",),
            namespace=PREFIX,
            registry=registry,
        )
        self.calibration_error = Gauge(
            "survival_calibration_error",
            "Mean of |predicted - real| over drafted nodes, as a probability",
            namespace=PREFIX,
            registry=registry,
        )
        self.step_time_error = Gauge(
            "step_time_error_ratio",
            "Mean of |predicted - measured| / measured over steps",
            namespace=PREFIX,
            registry=registry,
        )


class ReplicaMetrics:
    """What a replica counts; all series live in `registry`."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=PREFIX, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, namespace=PREFIX, registry=registry, buckets=buckets)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=PREFIX, registry=registry)

        self.requests = counter("requests", "Requests that ended, by HTTP status", "code")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted requests")
        self.generation_tokens = counter("generation_tokens", "Tokens sent to users", "domain")
        self.verification_passes = counter("verification_passes", "Target passes per request", "domain")
        self.drafts = counter("drafts", "Verification passes that had a draft", "domain")
        self.proposed_tokens = counter("draft_tokens", "Draft tokens proposed", "domain")
        self.accepted_tokens = counter("accepted_tokens", "Draft tokens accepted", "domain")
        self.unsound_drafts = counter("unsound_drafts", "Drafts cut where their probabilities were no distribution")
        self.accepted_per_position = counter(
            "accepted_tokens_per_position", "Draft tokens accepted at each position of the draft", "position"
        )
        self.request_latency_s = histogram("request_latency_seconds", "From arrival to last token", _LATENCY_S)
        self.first_token_s = histogram("time_to_first_token_seconds", "From arrival to first token", _LATENCY_S)
        self.output_token_s = histogram(
            "time_per_output_token_seconds", "Decode time per token after the first, by request", _TOKEN_S
        )
        self.step_s = histogram("engine_step_seconds", "One step of the engine", _TOKEN_S)
        self.running = gauge("requests_running", "Requests in the batch")
        self.waiting = gauge("requests_waiting", "Requests waiting for a slot or for blocks")
        self.kv_blocks = gauge("kv_blocks", "Blocks of the K/V cache, 16 positions each")
        self.kv_blocks_free = gauge("kv_blocks_free", "Blocks that no request holds, findable prefixes among them")
        self.prefix_hit_tokens = counter("prefix_hit_tokens", "Tokens whose K/V were found instead of computed")
        self.preemptions = counter("preemptions", "Requests sent back to the queue because blocks were short")
        self.observations = counter(
            "observations", "Observations by fate: sent, dropped (queue full), failed (too large)", "result"
        )
        self.observation_queue = gauge("observation_queue", "Observations waiting to be sent")
        self.swaps = counter("swaps", "Swaps to another draft version, applied")
        self.swap_refusals = counter("swap_refusals", "Versions refused; the old one kept serving", "reason")
        self.swap_wait_s = histogram("swap_wait_seconds", "From a warmed draft to the step that uses it", _TOKEN_S)
        self.draft_info = gauge("draft_info", "1 for the draft version that serves the default domain", "version")
        self.served_version = gauge("served_version", "Version last applied, 0 for none", "role", "domain")
        self.pointer_generation = gauge("pointer_generation", "Generation of the default draft's pointer last applied")
        self.store_up = gauge("store_up", "1 while the store answers, 0 during an outage", "store")
        self.unexpected_errors = counter("unexpected_errors", "Errors that reached the outermost loop of a thread")
        self.drafting = DraftingMetrics(registry)
        self._domains: set[str] = set()
        self._domain_lock = threading.Lock()

    def domain_label(self, domain: str) -> str:
        """The label for a domain: itself while at most MAX_DOMAINS are known, else `other`."""
        with self._domain_lock:
            if domain in self._domains or len(self._domains) < MAX_DOMAINS:
                self._domains.add(domain)
                return domain
        return OTHER_DOMAIN


class WorkerMetrics:
    """What a worker or the promoter counts; all series live in `registry`."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.lag = Gauge(
            "consumer_lag_records", "Records of the log not yet committed", namespace=PREFIX, registry=registry
        )
        self.consumed = Counter(
            "consumed_observations",
            "Observations read, by use: train, held_out, duplicate, skipped",
            ("use",),
            namespace=PREFIX,
            registry=registry,
        )
        self.train_steps = Counter("train_steps", "Optimizer steps", namespace=PREFIX, registry=registry)
        self.train_loss = Gauge("train_loss", "Distillation loss, nats a token", namespace=PREFIX, registry=registry)
        self.versions = Counter("registered_versions", "Versions registered", namespace=PREFIX, registry=registry)
        self.reports = Counter("evaluation_reports", "Reports recorded", namespace=PREFIX, registry=registry)
        self.decisions = Counter(
            "promotion_decisions", "Decisions by verdict", ("verdict",), namespace=PREFIX, registry=registry
        )
        self.store_up = Gauge(
            "store_up", "1 while the store answers, 0 during an outage", ("store",), namespace=PREFIX, registry=registry
        )
        self.errors = Counter(
            "unexpected_errors", "Errors that reached the outermost loop", namespace=PREFIX, registry=registry
        )


def configure_logging(process: str, *, level: int = logging.INFO) -> None:
    """One event a line on standard error: time, level, process, logger, message; call once per process."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level,
        format=f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s",
        force=True,
    )
