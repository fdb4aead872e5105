"""SAGA: Semantic Attribute Gradients from (frozen-MLLM) Adjudication, arXiv 2606.15134.

A frozen multimodal LLM compares two photos attribute by attribute and says whether they show the same class. The right
verdicts are rewarded, and the policy gradient runs through the frozen LM into the vision tower; where the teacher
looked teaches the pooler where to look. At inference the LM is gone.

    Eq. 1   S = [X_a, X_b, T_inst]                              visual tokens of two photos, then the instruction
    Eq. 2   Y_g ~ p_psi(. | S), g = 1..G                        rollouts, no gradient
    Eq. 3   r_g = 1 iff the parsed verdict is 1[y_a = y_b]      unparseable: 0
            A_g = (r_g - mean r) / (std r + eps)                groups with equal rewards are dropped (dynamic sampling)
    Eq. 5   L_GRPO = -1/|T| sum_g sum_t A_g log pi(y_gt | y_g<t, S)
    Eq. 6   alpha = mean over attribute tokens of head-averaged attention to the photo's patches, one layer
    Eq. 7   L_KL = KL(alpha_a || beta_a) + KL(alpha_b || beta_b)    beta: the pooler's attention; into the pooler only
    Eq. 8   L = lambda_dml L_DML + lambda_lm L_GRPO + lambda_kl L_KL

One optimizer step (Algorithm 1): phase A embeds micro-batches under the metric loss; phase B samples pairs of them
and keeps those whose rollouts disagree until K are found or the cap on micro-batches is reached; phase C replays the
kept ones with gradient. Deviations and assumptions, each a setting of :class:`SagaConfig`:

1. The tokens X are the post-merger tokens, DeepStack features are kept and trained (`freeze_deepstack` for the
   ablation).
2. The attention layer is 0-based and given as a share of the LM's depth (26 of 36), so that it fits any teacher.
3. Log-probabilities are those of the sampling temperature; top-p truncation is ignored in them (`replay_temperature`).
4. The standard deviation is the sample one (`unbiased_std`), eps 1e-4.
5. `pairs_per_batch` candidate pairs, half of them same-class, are tried per micro-batch; with `lookalikes` the
   different ones come from the nearest class by centroid instead of at random.
6. After `max_micro_batches` the step goes on with what is buffered; the log says so.
7. Clipping by global norm covers tower and pooler; proxies have their own learning rate and are not clipped, as in the
   code of Proxy Anchor.
8. The metric gradient is averaged over a step's micro-batches, so that its weight does not grow with the search for
   pairs.
9. The attention loss is averaged over all right rollouts of the buffer; one that does not describe both photos adds
   nothing to it.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from fieldmark.data.batches import class_centroids, sample_pairs
from fieldmark.errors import FieldmarkError
from fieldmark.losses.attention import attention_alignment
from fieldmark.losses.policy import group_advantages, policy_gradient_sum
from fieldmark.methods.reporting import write_run_report
from fieldmark.methods.run import (
    Task,
    TrainConfig,
    check_folder,
    checkpoint_to_resume,
    make_arguments,
    make_batches,
    make_loss,
    make_student,
    measure,
    open_task,
    save_run,
)
from fieldmark.methods.trainer import FieldmarkTrainer, gradient_norms
from fieldmark.methods.witness import Witness
from fieldmark.students.pooling import TokenPooling
from fieldmark.students.tower import VisionTower
from fieldmark.teacher.compare import (
    Domain,
    attribute_token_spans,
    compare_prompt,
    domain_for_attributes,
    load_domain,
    parse_verdict,
)
from fieldmark.teacher.model import Prompt, Teacher, VisualTokens
from fieldmark.teacher.prefix import replay, rollout


@dataclass
class SagaConfig(TrainConfig):
    """Settings of SAGA beside those every method has.

    Attributes:
        teacher: the frozen multimodal LLM (folder or hub id); the student's tower starts as its tower.
        domain: name or YAML file of the comparison prompt (birds, cars, aircraft, groceries, aviary, generic);
            null picks it by the catalogue's attribute names, as `build-teacher` does.
        lambda_dml: weight of the metric loss.
        lambda_lm: weight of the policy gradient.
        lambda_kl: weight of the attention alignment.
        group_size: G, rollouts a pair.
        target_pairs: K, pairs with disagreeing rollouts a step.
        pairs_per_batch: candidate pairs tried per micro-batch.
        max_micro_batches: micro-batches a step may use to find K pairs.
        lookalikes: draw different-class partners from the nearest class instead of at random.
        temperature: of sampling.
        top_p: of sampling.
        max_new_tokens: longest completion.
        replay_temperature: temperature of the log-probabilities; null is the sampling temperature.
        unbiased_std: sample standard deviation in the advantage.
        attention_layer: 0-based decoder layer of the attention targets; null is 26/36 of the depth.
        freeze_deepstack: leave the DeepStack mergers as they are (ablation).
        checkpoint_activations: recompute LM activations in the replay to save memory.
        teacher_dtype: precision of the frozen LM.
    """

    teacher: str | None = None
    domain: str | None = None
    lambda_dml: float = 1.0
    lambda_lm: float = 1.0
    lambda_kl: float = 1.0
    group_size: int = 8
    target_pairs: int = 8
    pairs_per_batch: int = 8
    max_micro_batches: int = 8
    lookalikes: bool = False
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 1024
    replay_temperature: float | None = None
    unbiased_std: bool = True
    attention_layer: int | None = None
    freeze_deepstack: bool = False
    checkpoint_activations: bool = True
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


SagaConfig.__doc__ = f"{TrainConfig.__doc__}\n{SagaConfig.__doc__}"


@dataclass
class Kept:
    """One pair in the buffer: its number among the step's candidates, two photos, its rollouts and what they earned."""

    number: int
    photos: tuple[int, int]
    ids: Tensor
    mask: Tensor
    rewards: Tensor
    advantages: Tensor


class SagaTrainer(FieldmarkTrainer):
    """One `training_step` is one optimizer step of Algorithm 1.

    Under several processes every process runs phase A on its slice of the global micro-batch and phases B and C on
    every world-size-th candidate pair. Phases B and C go around DDP's wrapper, so all gradients are reduced here,
    once a step.
    """

    def __init__(
        self, *args: Any, teacher: Teacher, domain: Domain, task: Task, config: SagaConfig, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.domain, self.task, self.config = teacher, domain, task, config
        self.tower, self.pooler = tower_and_pooler(self.model)
        self.photos: Any = self.train_dataset
        self.prompt: Prompt = teacher.prompt(compare_prompt(domain), 2, self.tower.tokens_per_image)
        depth = teacher.layers
        self.attention_layer = config.attention_layer if config.attention_layer is not None else depth * 26 // 36
        self.trained = [p for p in self.own_loss.parameters() if p.requires_grad]

    # -- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Phases A, B and C; gradients are left on tower, pooler and proxies. Returns the total loss (Eq. 8)."""
        self.model.train()
        inputs = self._prepare_inputs(inputs)
        step = self.state.global_step
        kept: list[Kept] = []
        tally: Counter[str] = Counter()
        dml: list[Tensor] = []
        seconds = 0.0
        for micro in range(self.config.max_micro_batches):
            if micro:
                inputs = self._further_batch(step, micro)
            dml.append(self._phase_a(inputs))
            if self.config.lambda_lm == 0 and self.config.lambda_kl == 0:
                break
            started = time.perf_counter()
            kept += self._phase_b(step, micro, len(kept), tally)
            seconds += time.perf_counter() - started
            if self._total(len(kept)) >= self.config.target_pairs:
                break
        scale_gradients(self.trained, 1.0 / len(dml))
        metric_gradient = [None if p.grad is None else p.grad.clone() for p in self.tower.parameters()]
        started = time.perf_counter()
        lm, kl, tokens = self._phase_c(kept)
        replayed = time.perf_counter() - started
        self._average(self._gradients())
        self._average([gradient for gradient in metric_gradient if gradient is not None])  # for the log alone
        self._note_health(tally, tokens, seconds, replayed, len(dml))
        norms = gradient_norms(self.model, self.own_loss)
        tower = [p.grad for p in self.tower.parameters()]
        self.note(**{"grad_norm/tower_dml": difference_norm(metric_gradient, [None] * len(tower))})
        self.note(**{"grad_norm/tower_lm": difference_norm(tower, metric_gradient)})
        self.note(**{f"grad_norm/{name}": norm for name, norm in norms.items()})
        mean_dml = torch.stack(dml).mean()
        self.note(**{"loss/dml": float(mean_dml), "loss/lm": lm, "loss/kl": kl})
        config = self.config
        return config.lambda_dml * mean_dml + config.lambda_lm * lm + config.lambda_kl * kl

    # -- phase A: the metric loss -------------------------------------------------------------------------------------

    def _phase_a(self, inputs: dict[str, Any]) -> Tensor:
        """Embeds a micro-batch and back-propagates the metric loss into tower, pooler and proxies."""
        features, labels = self.collect_features(inputs)
        with self.compute_loss_context_manager():
            loss = self.own_loss(features, labels)
        (self.config.lambda_dml * loss).backward()
        return loss.detach()

    def _further_batch(self, step: int, micro: int) -> dict[str, Any]:
        """This process's slice of micro-batch `micro` of the step."""
        indices = self.batches.global_batch(step, stream=micro)
        size = len(indices) // self.args.world_size
        own = indices[self.args.process_index * size : (self.args.process_index + 1) * size]
        with self.waiting():
            return self._prepare_inputs(self.data_collator([self.photos[i] for i in own]))

    # -- phase B: rollouts, no gradient -------------------------------------------------------------------------------

    @torch.no_grad()
    def _phase_b(self, step: int, micro: int, have: int, tally: Counter[str]) -> list[Kept]:
        """Rolls out this process's candidate pairs of the micro-batch and keeps those whose rewards differ."""
        config = self.config
        batch = self.batches.global_batch(step, stream=micro)
        labels = [self.task.labels[i] for i in batch]
        pairs = sample_pairs(
            labels,
            config.pairs_per_batch,
            seed=config.seed,
            epoch=step,
            step=micro,
            kind="balanced",
            centroids=self._centroids(batch, labels) if config.lookalikes else None,
        )
        mine = list(enumerate(pairs))[self.args.process_index :: self.args.world_size]
        if not mine:
            return []
        photos = [batch[i] for _, (a, b, _) in mine for i in (a, b)]
        self.model.eval()
        visual = self._visual(photos)
        self.model.train()
        # One stream of random numbers a pair: what a pair's rollouts are does not depend on who computes them.
        generators = [self._generator(step, micro, number) for number, _ in mine]
        rollouts = rollout(
            self.teacher,
            self.prompt,
            visual,
            group_size=config.group_size,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            generator=generators,
        )
        rewards = torch.zeros(len(mine), config.group_size)
        for row, (_, (_, _, same)) in enumerate(mine):
            for g, text in enumerate(rollouts.texts[row]):
                verdict = parse_verdict(text, self.domain)
                tally["rollouts"] += 1
                tally["valid"] += verdict.valid
                rewards[row, g] = float(verdict.valid and verdict.same == same)
        tally["right"] += int(rewards.sum())
        tally["pairs"] += len(mine)
        tally["tokens"] += int(rollouts.mask.sum())
        tally["all_right"] += int(rewards.bool().all(1).sum())
        tally["all_wrong"] += int((~rewards.bool()).all(1).sum())
        advantages = group_advantages(rewards, unbiased=config.unbiased_std).to(rollouts.ids.device)
        mixed = advantages.ne(0).any(1).cpu()
        return [
            Kept(
                number=micro * config.pairs_per_batch + mine[row][0],
                photos=(photos[2 * row], photos[2 * row + 1]),
                ids=rollouts.ids[row],
                mask=rollouts.mask[row],
                rewards=rewards[row],
                advantages=advantages[row],
            )
            for row in mixed.nonzero().flatten().tolist()
        ]

    def _generator(self, step: int, micro: int, pair: int) -> torch.Generator:
        key = ((self.config.seed * 1_000_003 + step) * 1_009 + micro) * 1_013 + pair
        return torch.Generator(device="cpu").manual_seed(key)

    def _visual(self, photos: list[int]) -> VisualTokens:
        """Tokens of the student's tower for training photos, [len(photos), N, D] with DeepStack."""
        refs = [self.photos[i]["photo"] for i in photos]
        with self.waiting():
            features = self._prepare_inputs(dict(self.tower.preprocess(refs)))
        with self.compute_loss_context_manager():
            out = self.tower(features)
        dtype = self.teacher.dtype
        return VisualTokens(out["token_embeddings"].to(dtype), tuple(t.to(dtype) for t in out["deepstack"]))

    def _centroids(self, batch: list[int], labels: list[int]) -> dict[Any, Any]:
        """Mean embedding of each class of the batch, for look-alike partners."""
        refs = [self.photos[i]["photo"] for i in batch]
        self.model.eval()
        with self.waiting():
            pixels = self._prepare_inputs(dict(self.tower.preprocess(refs)))
        features = self.model(pixels)
        self.model.train()
        return class_centroids(labels, features["sentence_embedding"])

    # -- phase C: replay with gradient --------------------------------------------------------------------------------

    def _phase_c(self, kept: list[Kept]) -> tuple[float, float, int]:
        """Back-propagates policy gradient (into the tower) and attention alignment (into the pooler), pair by pair."""
        config = self.config
        kept = self._first_of_all(kept)
        tokens = self._total(sum(int(pair.mask.sum()) for pair in kept))
        right = self._total(sum(int(pair.rewards.sum()) for pair in kept))
        if not kept:
            return self._total(0.0), self._total(0.0), tokens
        visual = self._visual([i for pair in kept for i in pair.photos])
        # The tower runs once for all pairs; the replays leave their gradients on these leaves.
        leaves = [t.detach().requires_grad_() for t in (visual.tokens, *visual.deepstack)]
        beta = self.pooler(
            {
                "token_embeddings": visual.tokens.detach().float(),
                "attention_mask": torch.ones(visual.tokens.shape[:2], dtype=torch.long, device=visual.tokens.device),
            }
        ).get("pooling_attention")
        lm_sum, kl_sum = 0.0, 0.0
        kl_total: Tensor | None = None
        for number, pair in enumerate(kept):
            two = slice(2 * number, 2 * number + 2)
            rows = self._attribute_rows(pair) if beta is not None and config.lambda_kl else None
            replayed = replay(
                self.teacher,
                self.prompt,
                VisualTokens(leaves[0][two], tuple(leaf[two] for leaf in leaves[1:])),
                pair.ids,
                pair.mask,
                temperature=config.replay_temperature or config.temperature,
                attention_layer=None if rows is None else self.attention_layer,
                attention_rows=rows,
                checkpoint=config.checkpoint_activations,
            )
            numerator = policy_gradient_sum(replayed.logprobs, pair.mask, pair.advantages)
            loss = numerator / tokens
            # Averaging over processes follows: the global sum needs this process's part times their number.
            (config.lambda_lm * self.args.world_size * loss).backward()
            lm_sum += float(loss.detach())
            if replayed.attention is not None and beta is not None:
                kl = self._alignment(pair, replayed.attention, beta[two])
                kl_total = kl if kl_total is None else kl_total + kl
        torch.autograd.backward([visual.tokens, *visual.deepstack], [leaf.grad for leaf in leaves])
        if kl_total is not None and right:
            kl_mean = kl_total / right
            (config.lambda_kl * self.args.world_size * kl_mean).backward()
            kl_sum = float(kl_mean.detach())
        return self._total(lm_sum), self._total(kl_sum), tokens

    def _attribute_rows(self, pair: Kept) -> Tensor:
        """[G, 2, T]: which tokens of each completion describe photo a, photo b."""
        rows = torch.zeros(len(pair.ids), 2, pair.ids.shape[1], dtype=torch.bool)
        for g, (ids, mask) in enumerate(zip(pair.ids.cpu(), pair.mask.cpu(), strict=True)):
            length = int(mask.sum())
            rows[g, :, :length] = attribute_token_spans(self.teacher.tokenizer, ids[:length], self.domain)
        return rows.to(pair.ids.device)

    @staticmethod
    def _alignment(pair: Kept, attention: Tensor, beta: Tensor) -> Tensor:
        """Sum of Eq. 7 over the pair's right rollouts that name attributes of both photos."""
        usable = (pair.rewards.to(attention.device) > 0) & (attention.sum(-1) > 0).all(-1)
        total = beta.sum() * 0.0
        for photo in range(2):
            target = attention[usable, photo]
            if len(target):
                total = total + len(target) * attention_alignment(target, beta[photo].expand_as(target))
        return total

    # -- processes and health -----------------------------------------------------------------------------------------

    def _total(self, value: Any) -> Any:
        """Sum over processes."""
        if self.args.world_size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.args.device)
        dist.all_reduce(tensor)
        return type(value)(tensor.item())

    def _first_of_all(self, kept: list[Kept]) -> list[Kept]:
        """Those of this process's pairs that are among the first K of all processes' pairs."""
        numbers = [pair.number for pair in kept]
        if self.args.world_size > 1:
            everyone: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(everyone, numbers)
            numbers = [number for part in everyone for number in part]
        chosen = set(sorted(numbers)[: self.config.target_pairs])
        return [pair for pair in kept if pair.number in chosen]

    def _gradients(self) -> list[Tensor]:
        """Of all trained parameters; under several processes each has one, if zero, for all must take part."""
        for parameter in self.trained:
            if parameter.grad is None and self.args.world_size > 1:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    def _average(self, gradients: list[Tensor]) -> None:
        """Averages gradients over processes, in place."""
        if self.args.world_size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= self.args.world_size

    def _note_health(self, tally: Counter[str], tokens: int, seconds: float, replayed: float, micro: int) -> None:
        names = ("rollouts", "valid", "right", "pairs", "tokens", "all_right", "all_wrong")
        total = {name: self._total(tally[name]) for name in names}
        if not total["rollouts"]:
            return
        mixed = total["pairs"] - total["all_right"] - total["all_wrong"]
        self.note(
            mixed_groups=mixed / total["pairs"],
            verdict_accuracy=total["right"] / total["rollouts"],
            valid_json=total["valid"] / total["rollouts"],
            completion_length=total["tokens"] / total["rollouts"],
            rollout_tokens_per_second=total["tokens"] / max(seconds, 1e-9),
            replay_tokens_per_second=tokens / max(replayed, 1e-9),
            kept_pairs=min(mixed, self.config.target_pairs),
            micro_batches=micro,
        )
        if mixed == 0:
            self._say_why_nothing_was_learned(total)

    def _say_why_nothing_was_learned(self, total: dict[str, int]) -> None:
        if total["valid"] == 0:
            why = f"none of {total['rollouts']} answers was valid JSON with a verdict"
        elif total["all_right"] == total["pairs"]:
            why = f"the teacher was right in all rollouts of all {total['pairs']} pairs: they are too easy for it"
        elif total["all_wrong"] == total["pairs"]:
            why = f"the teacher was wrong in all rollouts of all {total['pairs']} pairs: they are too hard for it"
        else:
            why = (
                f"no group was mixed: of {total['pairs']} pairs {total['all_right']} were right and "
                f"{total['all_wrong']} wrong in every rollout"
            )
        self.say(f"step {self.state.global_step + 1}: no policy gradient, {why}")


def scale_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    """Multiplies gradients in place."""
    if factor != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def difference_norm(gradients: list[Tensor | None], before: list[Tensor | None]) -> float:
    """Norm of what was added to the gradients since `before`; None is zero."""
    square = 0.0
    for gradient, old in zip(gradients, before, strict=True):
        if gradient is not None:
            change = gradient if old is None else gradient - old
            square += float(change.float().pow(2).sum())
    return square**0.5


def train(config: SagaConfig) -> Path:
    """Trains a student with SAGA; returns the run folder."""
    started = time.time()
    # 1. Catalogue
    task = open_task(config)
    # 2. Teacher: frozen, and the domain whose prompt it answers
    source = config.teacher
    if source is None:
        raise FieldmarkError(
            "SAGA needs a teacher; name a multimodal LLM with --teacher (a folder or a hub id), or build one for your "
            "catalogue with `fieldmark build-teacher`."
        )
    domain = choose_domain(config, task)
    if not domain.attributes:
        config = replace(config, lambda_kl=0.0)  # no named attributes, no tokens to align with (paper, section 4.3)
    teacher = Teacher.load(source, dtype=getattr(torch, config.teacher_dtype))
    check_settings(config, teacher, domain)
    # 3. Student: its tower starts as the teacher's own
    student = make_student(config, config.student or source)
    tower, _ = tower_and_pooler(student)
    check_tower(tower, teacher)
    if config.freeze_deepstack:
        freeze_deepstack(tower)
    # 4. Loss
    loss = make_loss(config, student, len(task.classes))
    out = check_folder(config, task.bad)
    # 5. The untrained student
    before = measure(student, task.test, config)
    # 6. Training
    batches = make_batches(config, task.labels)
    arguments = make_arguments(config, out, batches, loss)
    teacher.model.to(arguments.device)
    trainer = SagaTrainer(
        model=student,
        args=arguments,
        train_dataset=task.photos,
        loss=loss,
        batches=batches,
        log_path=out / "log.jsonl",
        description=f"SAGA over {config.loss}",
        teacher=teacher,
        domain=domain,
        task=task,
        config=config,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, out))
    # 7. The trained student
    after = measure(student, task.test, config)
    # 8. Save: the teacher stays behind
    if save_run(out, student, task.test, before, after, started, method="saga", seed=config.seed):
        # 9. Report, with the teacher's words about the trained student's tokens
        write_run_report(
            {"SAGA": out},
            task.train,
            task.test,
            student,
            after,
            out / "report.html",
            title=f"SAGA on {config.data}",
            witness=Witness(teacher, domain, trainer.attention_layer),
        )
    return out


def choose_domain(config: SagaConfig, task: Task) -> Domain:
    """The domain asked for, else the one of the catalogue's attributes (as `build-teacher` does), else the generic
    one."""
    if config.domain is not None:
        return load_domain(config.domain)
    names = task.train.features["attributes"]
    return domain_for_attributes(list(names) if isinstance(names, dict) else [])


def check_settings(config: SagaConfig, teacher: Teacher, domain: Domain) -> None:
    """Refuses settings that could teach nothing, before anything is computed."""
    if config.group_size < 2:
        raise FieldmarkError(f"group_size is {config.group_size}; a group needs at least 2 rollouts to differ.")
    least = dict.fromkeys(("target_pairs", "pairs_per_batch", "max_micro_batches", "max_new_tokens"), 1)
    for name, number in {**least, "lambda_dml": 0, "lambda_lm": 0, "lambda_kl": 0}.items():
        if getattr(config, name) < number:
            raise FieldmarkError(f"{name} is {getattr(config, name)}; give {number} or more.")
    for name in ("temperature", "replay_temperature", "top_p"):
        value = getattr(config, name)
        if value is not None and (not value > 0 or (name == "top_p" and value > 1)):
            raise FieldmarkError(f"{name} is {value}; give a number above 0{' up to 1' if name == 'top_p' else ''}.")
    layer = config.attention_layer
    if layer is not None and not 0 <= layer < teacher.layers:
        raise FieldmarkError(
            f"attention_layer {layer} was given; this teacher has layers 0 to {teacher.layers - 1}, choose one of them."
        )
    if config.lambda_kl and config.pooling == "mean":
        raise FieldmarkError("Mean pooling has no attention that a teacher could align; set --lambda_kl 0.")


def check_tower(tower: VisionTower, teacher: Teacher) -> None:
    """The teacher must understand the student's tokens: the tower is of its own tower's kind and size.

    Raises:
        FieldmarkError: it is not.
    """
    theirs, ours = teacher.model.config.vision_config, tower.encoder.config
    names = ("architecture", "depth", "num_hidden_layers", "hidden_size", "patch_size", "deepstack_visual_indexes")
    same = type(theirs) is type(ours) and all(getattr(theirs, n, None) == getattr(ours, n, None) for n in names)
    if not same or tower.token_dim != teacher.hidden_size:
        raise FieldmarkError(
            f"The student's tower ({type(ours).model_type}, tokens of width {tower.token_dim}) is not the teacher's "
            f"({type(theirs).model_type}, width {teacher.hidden_size}), whose tokens it reads; start the student from "
            "the teacher's own tower (leave --student out), or fit a projector first."
        )


def tower_and_pooler(student: SentenceTransformer) -> tuple[VisionTower, TokenPooling]:
    """The two modules of a student.

    Raises:
        FieldmarkError: it is made of others.
    """
    tower, pooler = student[0], student[1]
    if not isinstance(tower, VisionTower) or not isinstance(pooler, TokenPooling):
        raise FieldmarkError(
            f"The student is made of {type(tower).__name__} and {type(pooler).__name__}; "
            "SAGA needs a fieldmark tower and pooler."
        )
    return tower, pooler


def freeze_deepstack(tower: VisionTower) -> None:
    """Takes the DeepStack mergers out of training (papers.md 1.10, ablation)."""
    for name, parameter in tower.named_parameters():
        if "deepstack" in name:
            parameter.requires_grad_(False)
