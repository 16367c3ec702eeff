"""Configurations of the models that vLLM's scheduler tests name, without weights."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Blip2Config,
    Blip2Processor,
    BlipImageProcessorPil,
    OPTConfig,
    PreTrainedTokenizerFast,
)

_LLAVA = "llava-hf/llava-1.5-7b-hf"
_WORDS = ("<s>", "</s>", "<unk>", "<pad>", "<image>")


def write_models(folder: Path) -> None:
    """Write them below a folder: vLLM finds them by name where that is its folder.

    vLLM's LLaVA needs torchvision. In its place is a BLIP-2 with as many tokens for an
    image: the scheduler sees nothing else of a model. transformers' defaults of OPT are
    the sizes of opt-125m.
    """
    opt = {"architectures": ["OPTForCausalLM"], "dtype": "float16"}
    blip = {"architectures": ["Blip2ForConditionalGeneration"], "dtype": "float16"}
    words = {word: i for i, word in enumerate(_WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    configs = {
        "facebook/opt-125m": OPTConfig(**opt),
        "facebook/opt-350m": OPTConfig(**opt, num_hidden_layers=24),
        _LLAVA: Blip2Config(
            num_query_tokens=576,
            image_token_index=words["<image>"],
            text_config=OPTConfig(max_position_embeddings=4096).to_dict(),
            **blip,
        ),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    processor = Blip2Processor(BlipImageProcessorPil(), tokenizer, num_query_tokens=576)
    processor.save_pretrained(folder / _LLAVA)
