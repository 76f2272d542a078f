"""What the study of compression asks of a trained run: perplexity after every way of making its experts smaller."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from bench.effects.study import Trained
from moestro.compress.applied import applied
from moestro.compress.calibration import Ask, calibrate
from moestro.compress.criteria import CRITERIA
from moestro.compress.feed_forward import FeedForward
from moestro.compress.healing import Healing, heal_by_lora, heal_routers
from moestro.compress.merging import HC_SMOE, group_weights, merge_plans, similarity
from moestro.compress.merging import Settings as Merging
from moestro.compress.moe_i2 import Settings, moe_i2
from moestro.compress.plan import Group, LayerPlan, Quantisation
from moestro.compress.pruning import Subject, by_damage, by_scores, plan_of, uniform, with_skipping
from moestro.compress.quantised import quantised, restored
from moestro.compress.similarity import mean_similarity
from moestro.data import Batch
from moestro.evaluate import evaluate
from moestro.experts.split import split_ffn
from moestro.layers import DenseFFN, MoELayer
from moestro.model import Transformer
from moestro.objectives import LoadBalance
from moestro.routers import LinearScore, ScoredRouter, TopK

EXPERTS, NOISE = 8, 0.05
# Of 8 experts a layer: a quarter and a half go.
RATIOS = {"2 of 8": 0.25, "4 of 8": 0.5}
CALIBRATION, SAMPLE, HELD_OUT = 8192, 1024, 16_384
FURTHER_STEPS, HEALING_STEPS = 200, 50
RANDOM_DRAWS = 2


def compression(trained: Trained) -> dict[str, Any]:
    """{way: perplexity on held-out text}, of the whole model under "whole"; and "similarity", the mean CKA of a layer's
    experts. A dense run is first made a mixture: its network copied into 8 experts with 5 % of noise, trained further.
    """
    model = trained.model()
    if not model.moe_layers():
        model = upcycled(model, trained)
    return Ways(model, trained).measured()


def upcycled(dense: Transformer, trained: Trained) -> Transformer:
    """The dense model with every feed-forward network copied into 8 experts that differ by noise of 5 % of the weights'
    standard deviation, 2 a token, trained on for so many steps with the load balanced."""
    generator = torch.Generator().manual_seed(trained.recipe.train.value("seed"))
    for block in dense.blocks:
        ffn = block.ffn
        if not isinstance(ffn, DenseFFN):
            raise ValueError(f"{type(ffn).__name__} is no dense layer to copy")
        bank = split_ffn(ffn.expert, [ffn.expert.width])
        bank.reindex(torch.zeros(EXPERTS, dtype=torch.int64))
        with torch.no_grad():
            for weight in bank.parameters():
                weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
            router = ScoredRouter(LinearScore(dense.d_model, EXPERTS), TopK(2))
            router.score.weight.copy_(0.02 * torch.randn(EXPERTS, dense.d_model, generator=generator))
        block.ffn = MoELayer(router, [bank])
    train_on(dense, trained, FURTHER_STEPS if trained.final_tokens > HELD_OUT else 5)
    return dense.eval()


def train_on(model: Transformer, trained: Trained, steps: int) -> None:
    """AdamW, warm-up and linear decay, on batches that training did not have in this order."""
    balance, size = LoadBalance(), trained.recipe.train.value("batch_size")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, (steps - step) / steps))
    model.train()
    for step in range(steps):
        batch = trained.dataset.train_batch(step, size, seed=10**6)
        output = model(batch.tokens, documents=batch.documents, keep=batch.keep)
        logits, targets = output.logits.flatten(0, 1), batch.targets.flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
        loss = loss + 0.01 * sum(balance(trace) for trace in output.traces)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()


class Ways:
    """Every way of making one model smaller, calibrated on its training text."""

    def __init__(self, model: Transformer, trained: Trained) -> None:
        self.model, self.trained = model, trained
        self.size = trained.recipe.train.value("batch_size")
        self.seed = trained.recipe.train.value("seed")
        quick = trained.final_tokens <= HELD_OUT
        self.healing = Healing(steps=3 if quick else HEALING_STEPS, lr=2e-3, rank=8, alpha=16)
        self.tokens = min(CALIBRATION, trained.final_tokens)
        count = max(1, self.tokens // self.size // trained.dataset.seq_len)
        self.text = [self.training_batch(number) for number in range(count)]

    def training_batch(self, number: int) -> Batch:
        """A batch of training text, in an order of its own."""
        return self.trained.dataset.train_batch(number, self.size, seed=10**6 + 1)

    @cached_property
    def subject(self) -> Subject:
        """The model and its statistics."""
        ask = Ask(sample=min(SAMPLE, self.tokens), everywhere=True, moments=True, seed=self.seed)
        return Subject(self.model, calibrate(self.model, self.text, ask), self.seed)

    def perplexity(self, model: Transformer) -> float:
        """On held-out windows spread over the text."""
        return evaluate(model, self.trained.held_out(min(HELD_OUT, self.trained.final_tokens)))["perplexity"]

    def measured(self) -> dict[str, Any]:
        """Everything, way by way."""
        alike = [mean_similarity(similarity(self.subject, name, "cka-outputs")) for name in self.subject.layers]
        found = {"similarity": sum(alike) / len(alike), "whole": self.perplexity(self.model)}
        for label, ratio in RATIOS.items():
            found |= {f"{way}, {label}": value for way, value in self.removing(ratio).items()}
            found |= {f"{way}, {label}": value for way, value in self.merging(ratio).items()}
            found |= {f"{way}, {label}": value for way, value in self.healed(ratio).items()}
        return {**found, **self.thinner(), **self.rounded()}

    def of(
        self, plans: Sequence[LayerPlan], semantics: Any = "slice", rows: str = "kept", whiten: bool = False
    ) -> float:
        """Perplexity of plans."""
        moments = self.subject.collected.layers if whiten else None
        return self.perplexity(applied(self.model, plans, semantics, rows, moments))

    def removing(self, ratio: float) -> dict[str, float]:
        """Experts that go, by what they are chosen, as many of each layer unless said otherwise."""
        counts = uniform(self.subject, ratio)
        found = {name: self.of(by_scores(self.subject, name, counts)) for name in CRITERIA}
        draws = [replace(self.subject, seed=1000 * draw + self.seed) for draw in range(RANDOM_DRAWS)]
        random = [self.of(by_scores(draw, "random", counts)) for draw in draws]
        same = Settings(ratio=ratio, counts="uniform")
        return found | {
            "random": sum(random) / len(random),
            "recon": self.of(by_damage(self.subject, counts)),
            "reap, zeroed": self.of(by_scores(self.subject, "reap", counts), "zero"),
            "moe-i2, uniform": self.of(moe_i2(self.subject, self.text[:4], same)),
            "moe-i2": self.of(self.unequal[ratio]),
        }

    def merging(self, ratio: float) -> dict[str, float]:
        """Experts that become one."""
        cka = merge_plans(self.subject, Merging(ratio))
        groups = [self.random_groups(plan) for plan in cka]
        return {
            "cka remap": self.of(cka, "remap"),
            "cka shrink": self.of(cka, "slice", "mean"),
            "random groups": self.of(groups, "remap"),
            "hc-smoe": self.of(merge_plans(self.subject, replace(HC_SMOE, ratio=ratio)), "remap"),
        }

    def random_groups(self, plan: LayerPlan) -> LayerPlan:
        """Groups of the same sizes whose members are drawn."""
        name = f"blocks.{plan.layer}.ffn"
        generator = torch.Generator().manual_seed(1000 * self.seed + plan.layer)
        order = torch.randperm(plan.n_experts, generator=generator).tolist()
        found, rows = [], self.subject.seen(name).rows.tolist()
        for group in plan.groups or ():
            members, order = tuple(sorted(order[: len(group.members)])), order[len(group.members) :]
            kept = max(members, key=lambda member: rows[member])
            found.append((kept, Group(members, group_weights(self.subject, name, members, kept, Merging()), True)))
        found.sort(key=lambda pair: pair[0])
        gone = set(range(plan.n_experts)) - {kept for kept, _ in found}
        return replace(plan_of(self.subject, name, sorted(gone)), groups=tuple(group for _, group in found))

    @cached_property
    def unequal(self) -> dict[float, list[LayerPlan]]:
        """MoE-I2's plans, with unequal counts."""
        return {ratio: moe_i2(self.subject, self.text[:4], Settings(ratio=ratio)) for ratio in RATIOS.values()}

    def healed(self, ratio: float) -> dict[str, float]:
        """MoE-I2's plan after training LoRA, and after its routers were taught by the whole model."""
        routers = applied(self.model, self.unequal[ratio])
        heal_routers(routers, self.model, self.training_batch, self.healing)
        return {
            "moe-i2, lora": self.trained_on(applied(self.model, self.unequal[ratio])),
            "moe-i2, router-kd": self.perplexity(routers),
        }

    def trained_on(self, model: Transformer) -> float:
        """Perplexity after LoRA, in place."""
        heal_by_lora(model, self.training_batch, self.healing, self.seed)
        return self.perplexity(model)

    def thinner(self) -> dict[str, float]:
        """Low ranks that keep a share of the experts' parameters, by plain and by whitened decomposition; tokens that
        skip their second expert; and the whole model after as much LoRA as the healed ones had."""
        found = {}
        for fraction in (0.75, 0.5):
            plans = moe_i2(self.subject, self.text, Settings(ratio=0.0, fraction=fraction, lowest=0.75))
            found[f"svd, {fraction} kept"] = self.of(plans)
            found[f"svd whitened, {fraction} kept"] = self.of(plans, whiten=True)
        everything = [plan_of(self.subject, name, ()) for name in self.subject.layers]
        found["skipping"] = self.of(with_skipping(self.subject, everything))
        return found | {"whole, lora": self.trained_on(copy.deepcopy(self.model))}

    def rounded(self) -> dict[str, float]:
        """Experts in 8 and 4 bits, whole or after a quarter of them went."""
        pruned = applied(self.model, by_scores(self.subject, "reap", uniform(self.subject, 0.25)))
        int8, int4 = Quantisation("int8"), Quantisation("int4", 32)
        return {
            "int8": self.perplexity(self.in_bits(self.model, int8)),
            "fp8": self.perplexity(self.in_bits(self.model, Quantisation("fp8"))),
            "int4": self.perplexity(self.in_bits(self.model, int4)),
            "int4 calibrated": self.perplexity(self.in_bits(self.model, replace(int4, calibrated=True))),
            "reap, 2 of 8, int4": self.perplexity(self.in_bits(pruned, int4)),
        }

    def in_bits(self, model: Transformer, how: Quantisation) -> Transformer:
        """A copy whose experts' matrices went through a scheme and back."""
        rounded = copy.deepcopy(model)
        for name, layer in rounded.moe_layers().items():
            bank = FeedForward.of(layer)
            experts = []
            for expert in range(layer.router.n_experts):
                moments = self.moments(name, expert) if how.calibrated else (None, None)
                *inside, out = bank.units(expert).split(bank.d_model, dim=1)
                parts = [(matrix, moments[0]) for matrix in inside] + [(out.T, moments[1])]
                *inside, out = (restored(quantised(matrix.contiguous(), how, m), how) for matrix, m in parts)
                experts.append(torch.cat([*inside, out.T], dim=1))
            layer.branches[0] = bank.bank_of(experts)
        return rounded

    def moments(self, name: str, expert: int) -> tuple[Any, Any]:
        """Second moments of the inputs of an expert's matrices."""
        seen = self.subject.seen(name)
        return seen.sums[f"input_moments_{expert}"], seen.sums[f"hidden_moments_{expert}"]
