"""The model's tokenizer: byte-level BPE, with the frame of a call cut into whole tokens.

Words carry no leading space, so a word has the same tokens in a prompt and between the quotes of a call, and copying
is a token-by-token affair. A key with its punctuation (`, "room": "`) is one token, which keeps sequences short.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"
_PIECES = r"""(?:\{|"?, )"[a-z_]+": "?|"?\}|[A-Za-z]+(?:_[a-z]+)*|[0-9]| |[^A-Za-z0-9 ]"""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of at most `vocab_size` from `texts`; the same texts give the same vocabulary."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = Sequence(
        [Split(Regex(_PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
