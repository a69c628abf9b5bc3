"""Wrong labels and a Hugging Face classifier: one weight per training sample, with the model's own loss on clean data.

A small BERT with random weights reads sentences of a made-up language, in which the class of a sentence is the group of
words it has most of. 40% of the training labels are wrong. Batches are what a tokenizer and a collator make, a
``BatchEncoding``, from which ``state.batch`` takes what the model is called with. Nothing is downloaded; for a model of
your own, put ``AutoModelForSequenceClassification.from_pretrained`` in the place of ``classifier``.
"""

from typing import Any

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

from tune_implicit import BilevelProblem, State, search

N_CLASSES, WORDS_PER_CLASS, LENGTH = 4, 8, 12
SIZES = {"train": 480, "validate": 300, "select": 300, "test": 600}
WRONG = 0.4
BATCH_SIZE = 60
PAD, CLS, FIRST_WORD = 0, 1, 2

space = {"ll_learning_rate": FloatDistribution(5e-4, 2e-3, log=True)}
settings = {
    "ul_learning_rate": 0.3,
    "warmup_ll_steps": 80,  # of wrong labels nothing can be told before there is a classifier
    "ll_steps": 4,
    "max_ll_gradient_norm": 1.0,
}


def sentences(n: int) -> tuple[Tensor, Tensor]:
    """Return token ids of shape (n, LENGTH), padded, and classes."""
    labels = torch.randint(N_CLASSES, (n,))
    of_class = torch.rand(n, LENGTH) < 0.6  # other words are of any class
    groups = torch.where(of_class, labels[:, None], torch.randint(N_CLASSES, (n, LENGTH)))
    ids = FIRST_WORD + groups * WORDS_PER_CLASS + torch.randint(WORDS_PER_CLASS, (n, LENGTH))
    ids[:, 0] = CLS
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (n, 1))
    return ids.where(torch.arange(LENGTH) < lengths, PAD), labels


def data(seed: int = 0) -> dict[str, list[dict[str, Tensor]]]:
    """Return four splits as lists of samples, the wrong labels in that for training, and which samples have them."""
    torch.manual_seed(seed)
    splits = {}
    for name, n in SIZES.items():
        ids, labels = sentences(n)
        wrong = torch.rand(n) < (WRONG if name == "train" else 0.0)
        labels[wrong] = (labels[wrong] + torch.randint(1, N_CLASSES, (int(wrong.sum()),))) % N_CLASSES
        columns = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels, "wrong": wrong}
        columns["sample"] = torch.arange(n)
        splits[name] = [{key: column[row] for key, column in columns.items()} for row in range(n)]
    return splits


def collate(samples: list[dict[str, Tensor]]) -> BatchEncoding:
    """Return what a tokenizer returns, with ``sample`` for which samples of the split are in the batch."""
    keys = ("input_ids", "attention_mask", "labels", "sample")
    return BatchEncoding({key: torch.stack([sample[key] for sample in samples]) for key in keys})


def classifier() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=FIRST_WORD + N_CLASSES * WORDS_PER_CLASS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=N_CLASSES,
        pad_token_id=PAD,
    )
    return BertForSequenceClassification(config)


class SampleWeights(nn.Module):
    """One weight in (0, 2) per training sample, all of them 1 at first."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n))

    def forward(self, sample: Tensor) -> Tensor:
        """Return the weights of the samples ``sample``."""
        return 2 * self.logits[sample].sigmoid()


def outputs(state: State) -> Any:
    """Return what the classifier returns for a batch, its loss among it."""
    return state.ll_model(**{key: value for key, value in state.batch.items() if key != "sample"})


def ul_objective(state: State) -> Tensor:
    return outputs(state).loss


def ll_objective(state: State) -> Tensor:
    losses = cross_entropy(outputs(state).logits, state.batch["labels"], reduction="none")
    return (state.ul_model(state.batch["sample"]) * losses).mean()


def accuracy(state: State) -> Tensor:
    return (outputs(state).logits.argmax(1) == state.batch["labels"]).float().mean()


def problem(config: dict[str, Any], splits: dict[str, Any]) -> BilevelProblem:
    """Return the problem of one trial; ``config`` need not tell it anything."""
    loaders = {
        name: DataLoader(samples, BATCH_SIZE, shuffle=name == "train", collate_fn=collate)
        for name, samples in splits.items()
    }
    return BilevelProblem(
        ul_model=SampleWeights(len(splits["train"])),
        ll_model=classifier(),
        ul_objective=ul_objective,
        ll_objective=ll_objective,
        train_data=loaders["train"],
        validate_data=loaders["validate"],
        select_data=loaders["select"],
        metrics={"accuracy": accuracy},
        ll_optimizer=torch.optim.AdamW,
    )


@torch.no_grad()
def test_accuracy(model: nn.Module, splits: dict[str, Any]) -> float:
    batch = collate(splits["test"])
    state = State.of(batch, nn.Module(), model.eval())
    return accuracy(state).item()


def main(ul_steps: int = 60, n_trials: int = 2) -> dict[str, float]:
    splits = data()
    accuracies = {}
    for name, changes in {"plain": {"ul_learning_rate": 0.0}, "hybrid": {}}.items():
        result = search(
            problem,
            space,
            data=splits,
            settings=settings | {"ul_steps": ul_steps} | changes,
            backend="optuna",
            n_trials=n_trials,
            seed=0,
        )
        model = classifier()
        model.load_state_dict(result.best.ll_state)
        accuracies[name] = test_accuracy(model, splits)
        print(f"{name}: loss on held-out data {result.best.value:.3f}, test accuracy {accuracies[name]:.3f}")
    logits = result.best.ul_state["logits"]
    wrong = torch.stack([sample["wrong"] for sample in splits["train"]])
    weights = 2 * logits.sigmoid()
    print(f"mean weight of right labels {weights[~wrong].mean():.2f}, of wrong ones {weights[wrong].mean():.2f}")
    return accuracies


if __name__ == "__main__":
    main()
