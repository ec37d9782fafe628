"""Bodies of small messages, shrunk: raw DEFLATE (RFC 1951), primed with the words that they tend to hold.

A message that carries a few hundred scalars spends a third of its bytes on names otherwise. Large bodies, whose tensors
weigh more, travel as they are, which also bounds what a few bytes can grow to.
"""

from __future__ import annotations

import zlib
from typing import Final

INFLATED_LIMIT: Final = 1 << 16  # bytes of a body that may travel deflated

# Part of the protocol: any change needs a new PROTOCOL_VERSION. Frequent words are last, where they cost least.
_WORDS: Final = (
    b"conv1dlinearbackpropforwardaccumulateclipweight_decaymomentumscheduleconstantcosineestimatorfzoospsaoptimizer"
    b"adamwsgdexchangegradientdraw_seeddirectionszo_lrmax_lengthbatch_sizeepssubspacelorazeroth_orderlr"
    b"lossexact_matchtoken_accuracyaccuracystepstokensloss_sumn"
)


def deflate(body: bytes) -> bytes:
    """A deflated body; not always shorter."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_DEFAULT_STRATEGY, _WORDS)
    return stream.compress(body) + stream.flush()


def inflate(data: bytes | memoryview) -> bytes:
    """The body that was deflated. Memory: at most INFLATED_LIMIT bytes.

    Raises:
        ValueError: for what is no deflated body, is larger, or would have been shorter as it was.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS, _WORDS)
    try:
        body = stream.decompress(data, INFLATED_LIMIT + 1)
    except zlib.error as error:
        raise ValueError(f"a deflated body must be a stream of RFC 1951: {error}") from None
    if len(body) > INFLATED_LIMIT:
        raise ValueError(f"a deflated body must stand for <= {INFLATED_LIMIT} bytes, got more")
    if not stream.eof or stream.unused_data:
        raise ValueError("a deflated body must be one whole stream and nothing else")
    if len(data) >= len(body):
        raise ValueError(f"a deflated body must be shorter than the {len(body)} bytes it stands for, got {len(data)}")
    return body
