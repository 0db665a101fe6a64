"""transformers.Trainer trains the float model, and then its quantized student, distilled from it.

    pip install 'hq-plugin[transformers]' scikit-learn
    python docs/examples/huggingface_trainer.py

hq_plugin finds the policy; the quantization-aware training is Trainer's own, with all that it brings (schedules,
logging, several GPUs, callbacks). Use this where the training has to be yours, and `hq.quantize` where it need not.
"""

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import hq_plugin as hq
from hq_plugin import torch_ao
from hq_plugin.distillation import kl_divergence

raw = load_digits()
images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, raw.target, strict=True)]
train, test = [row for i, row in enumerate(rows) if i % 5], rows[::5]


def arguments(epochs: int, rate: float) -> TrainingArguments:
    """Trainer's options, with nothing written but what is asked for."""
    return TrainingArguments(
        output_dir="trainer",
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=rate,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=0,
    )


def accuracy(prediction) -> dict[str, float]:
    """Top-1, as Trainer wants its metrics."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Distiller(Trainer):
    """A Trainer whose loss is the divergence from the float model; labels are not used."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """Returns the KL divergence of the student from the teacher."""
        with torch.no_grad():
            target = teacher(pixel_values=inputs["pixel_values"]).logits
        output = model(**inputs)
        loss = kl_divergence(output.logits, target)
        return (loss, output) if return_outputs else loss


torch.manual_seed(0)
config = ViTConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_labels=10,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
teacher = ViTForImageClassification(config)
trainer = Trainer(teacher, arguments(10, 4e-3), train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
trainer.train()
float_accuracy = trainer.evaluate()["eval_accuracy"]
teacher.eval()

# Which width each layer gets: no training of ours but the MetaQuantNet's.
batches = [{"pixel_values": x} for x in images[1:].split(64)]
session = hq.meta_train(teacher, batches, effort="fast", meta_steps=10, search_evaluations=30)
policy = session.search("3bit").policy

student = torch_ao.prepare(teacher, policy)
with torch.no_grad(), torch_ao.calibrate(student):
    for batch in batches[:4]:
        student(**batch)
distiller = Distiller(student, arguments(2, 5e-4), train_dataset=train)
distiller.train()

small = torch_ao.convert(student)
with torch.no_grad():
    predicted = small(pixel_values=images[::5]).logits.argmax(-1)
hybrid_accuracy = float((predicted == torch.tensor(raw.target[::5])).float().mean())
print(f"float accuracy {float_accuracy:.3f}, hybrid at 3 bits {hybrid_accuracy:.3f}")
