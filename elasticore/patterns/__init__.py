"""Which key blocks a head may read: one pattern, one file."""

from elasticore.patterns.full import Full
from elasticore.patterns.infllm import InfLLMV2
from elasticore.patterns.moba import MoBA
from elasticore.patterns.nsa import NSASelected
from elasticore.patterns.pattern import HeadMode, Pattern
from elasticore.patterns.selector import BlockLists, BlockSelector
from elasticore.patterns.streaming import Streaming
from elasticore.patterns.trianglemix import TriangleMix
from elasticore.patterns.xattention import XAttention

__all__ = [
    "BlockLists",
    "BlockSelector",
    "Full",
    "HeadMode",
    "InfLLMV2",
    "MoBA",
    "NSASelected",
    "Pattern",
    "Streaming",
    "TriangleMix",
    "XAttention",
]
