"""Which key blocks a head may read: one pattern, one file."""

from elasticore.patterns.selector import BlockLists, BlockSelector
from elasticore.patterns.streaming import Streaming
from elasticore.patterns.xattention import XAttention

__all__ = ["BlockLists", "BlockSelector", "Streaming", "XAttention"]
