"""The engine: one target, its drafter, and the step that serves every running request at once.

`step` reads top to bottom: swap if a draft is waiting, schedule, draft, one target pass, choose and verify, keep the
accepted nodes, commit, observe. Output is a function of prompt and seed only (`sampling`), so nothing that changes
between steps can change what users get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from slipstream.drafting.chain import ChainDrafter
from slipstream.drafting.drafter import DraftContext, Drafter
from slipstream.drafting.tree import NO_DRAFT, DraftTree
from slipstream.engine.admission import Admissible, check_request
from slipstream.engine.batch import OnBlock, RunningSequence
from slipstream.engine.counting import StepCounts
from slipstream.engine.decoders import open_decoder
from slipstream.engine.observer import ObservationSource, observations_of
from slipstream.engine.packing import moves_of, pack
from slipstream.engine.passes import Pass, choose_and_verify, note_logprobs
from slipstream.engine.plan import BLOCK_TOKENS, PagedDecoder, StepOutput
from slipstream.engine.request import FinishReason, Request, TokenBlock
from slipstream.engine.scheduler import EngineLimits, Scheduler
from slipstream.engine.stops import StopStrings, TokenBytes
from slipstream.errors import ArtifactRejected
from slipstream.models.checkpoint import Checkpoint, check_draft
from slipstream.records import Observation
from slipstream.telemetry import ReplicaMetrics
from slipstream.versions import NO_VERSION

NO_ROUTING_VERSION = 0
