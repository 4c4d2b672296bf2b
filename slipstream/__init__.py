"""Slipstream: speculative decoding for mixture-of-experts models that learns from the traffic it serves.

The package is the functional core: nouns and rules. The processes are in `services/` and `workers/`.
"""

from slipstream.config import Config, load_config
from slipstream.errors import SlipstreamError
from slipstream.promotion import EvaluationReport, PromotionDecision, PromotionGate
from slipstream.records import Observation, RoutingTrace
from slipstream.versions import Lineage, ModelVersion, ServingPointer

__version__ = "0.1.0"

__all__ = [
    "Config",
    "EvaluationReport",
    "Lineage",
    "ModelVersion",
    "Observation",
    "PromotionDecision",
    "PromotionGate",
    "RoutingTrace",
    "ServingPointer",
    "SlipstreamError",
    "load_config",
]
