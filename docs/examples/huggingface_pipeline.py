"""A transformers pipeline goes in and a quantized pipeline comes out; the folder loads with `pipeline` again.

    pip install 'hq-plugin[transformers]'
    python docs/examples/huggingface_pipeline.py

So that it runs offline, the model is a very small Llama which is trained for seconds on the text of the Python
reference that comes with Python: what it writes is no English. With a model of your own, begin at `hq.quantize`.
"""

from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import hq_plugin as hq

TEXTS = [text for _, text in sorted(topics.items())][:40]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-pair tokenizer of 512 tokens."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token="<s>", eos_token="</s>", pad_token="</s>")


torch.manual_seed(0)
tokenizer = make_tokenizer()
config = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
model = LlamaForCausalLM(config)
stream = torch.tensor(tokenizer("\n".join(TEXTS))["input_ids"])
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(60):
    starts = torch.randint(len(stream) - 64, (8,)).tolist()
    ids = torch.stack([stream[start : start + 64] for start in starts])
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()

generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
small = hq.quantize(
    generator,
    "4bit",
    TEXTS,
    sequence_length=64,
    effort="fast",
    meta_steps=8,
    search_evaluations=20,
    finetune_steps=20,
)
small.save_pretrained("small-llama")  # config.json, model.safetensors, tokenizer, model card

again = pipeline("text-generation", model="small-llama")  # this process has imported hq_plugin, so it knows how
settings = {"max_new_tokens": 12, "do_sample": False}
before, after = (made("The statement", **settings)[0]["generated_text"] for made in (small, again))
result = small.model.hq
print(
    f"{result.effective_bits:.2f} bits a weight, {result.float_size:,} -> {result.size:,} bytes, KL {result.kl:.3f}"
)
print("quantized:", repr(before))
print("loaded:   ", repr(after))
