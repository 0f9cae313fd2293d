"""A Hugging Face model for lm-evaluation-harness that keeps what every request cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from elasticore.data.prompting import end_token, prompt_tokens
from elasticore.errors import UnsupportedRequest
from elasticore.eval.benchmarks.task import Rendered
from elasticore.eval.journal import Entry, Journal, key
from elasticore.eval.measuring import Measures, measured
from elasticore.models.generating import greedy
from elasticore.processes import current

__all__ = ["ElasticLM"]


class ElasticLM(HFLM):
    """Answers the harness's generation requests, the longest first, and writes each one down.

    Parameters
    ----------
    model, tokenizer
        A causal language model, elastic or not, and its tokenizer.
    journal
        Where answers go, each as soon as its batch is done. What is there already is not asked
        again, so an interrupted evaluation goes on where it stopped.
    batch_size
        Prompts of a batch; they are padded on the left.
    max_length
        Tokens of the longest prompt with its answer; None means what the model's positions allow.
    thinking
        Whether the chat template is to let the model think before it answers.
    progress
        Wraps the batches, for a progress bar.
    settings
        Of :class:`lm_eval.models.huggingface.HFLM`.

    Attributes
    ----------
    answered
        The answers to what was asked here, by task and document; the journal may hold others.

    Raises
    ------
    ValueError
        In a request for loglikelihoods, which would route answers together with their prompts; if
        a prompt with its answer is longer than the model's positions; if the tokenizer has no end
        of text.
    UnsupportedRequest
        If a batch does not fit into memory; the message says which, and what to do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        journal: Journal,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        thinking: bool = False,
        progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
        **settings: Any,
    ) -> None:
        end_token(tokenizer, "ends answers")
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            backend="causal",
            chat_template_args={"enable_thinking": thinking},
            **settings,
        )
        here = current()
        self._rank, self._world_size = here.rank, here.size
        self.journal = journal
        self.progress = progress
        self.answered: dict[tuple[str, int], Entry] = {}
        self._measures: list[Measures] = []
        self._prompts: dict[str, list[int]] = {}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of ``requests``."""
        # The harness gives some twice, so that all processes have equally many.
        asked = requests
        requests = list({key(request): request for request in asked}.values())
        tokens = {key(request): self._tokens(request) for request in requests}
        sizes = {name: len(own) for name, own in tokens.items()}
        self._check_lengths(requests, sizes)
        # A batch that was cut off is answered again as a whole, so that a resumed run computes what
        # a run in one piece would have.
        todo = [
            batch
            for batch in self._batches(requests, sizes)
            if any(key(request) not in self.journal for request in batch)
        ]
        for batch in self.progress(todo):
            order = _Order()
            self.cache_hook = order
            self._prompts = {request.args[0]: tokens[key(request)] for request in batch}
            try:
                answers = super().generate_until(batch, disable_tqdm=True)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                raise UnsupportedRequest(self._too_large(batch, sizes)) from error
            # The harness answers in its own order, and tells the hook; equal prompts are alike.
            places = order.places([request.args[0] for request in batch])
            for request, answer, place in zip(batch, answers, places, strict=True):
                if key(request) not in self.journal:
                    self.journal.add(request, answer, self._measures[place])
        entries = [self.journal[key(request)] for request in asked]
        self.answered |= {(one.task, one.document): one for one in entries}
        return [one.answer for one in entries]

    def _check_lengths(self, requests: list[Instance], sizes: dict[str, int]) -> None:
        """Refuse what the harness would cut, the first one to be found."""
        for request in requests:
            size, new = sizes[key(request)], request.args[1]["max_gen_toks"]
            if size + new > self.max_length:
                raise ValueError(
                    f"task {request.task_name}, document {request.doc_id}: {size} tokens of prompt "
                    f"and {new} of answer exceed the {self.max_length} positions of the model; "
                    "ask for a shorter length, or set a lower limit where prompts are cut."
                )

    def _too_large(self, batch: list[Instance], sizes: dict[str, int]) -> str:
        longest = max(batch, key=lambda request: sizes[key(request)])
        advice = (
            "start the same command again with a smaller --batch-size"
            if len(batch) > 1
            else "use shorter --lengths, a lower --limit, or a GPU with more memory"
        )
        return (
            f"task {longest.task_name}: a prompt of {sizes[key(longest)]} tokens in a batch of "
            f"{len(batch)} does not fit into memory; {advice}. The {len(self.journal)} answers so "
            f"far are kept in {self.journal.path}."
        )

    def _batches(self, requests: list[Instance], sizes: dict[str, int]) -> Iterator[list[Instance]]:
        """Requests with the same settings, by falling length, so that too long ones fail first."""

        def settings(request: Instance) -> str:
            return repr(sorted(request.args[1].items()))

        ordered = sorted(requests, key=lambda r: (settings(r), -sizes[key(r)]))
        for _, alike in groupby(ordered, settings):
            group = list(alike)
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _tokens(self, request: Instance) -> list[int]:
        """As the model is asked anywhere else; a chat template has written all special tokens."""
        prompt = request.args[0]
        if isinstance(request, Rendered):
            ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            return ids
        return prompt_tokens(self.tokenizer, prompt)

    def tok_batch_encode(self, strings: Sequence[str], **_: Any) -> tuple[Tensor, Tensor]:
        """The prompts' tokens, padded on the left, and their mask; lengths were checked."""
        rows = [self._prompts[text] for text in strings]
        width = max(map(len, rows))
        padding = self.tokenizer.pad_token_id
        ids = [[padding] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        with greedy(self.model), measured(self.model) as batch:
            out: Tensor = super()._model_generate(context, max_length, stop, **settings)
        lengths = settings["attention_mask"].sum(1)
        new = out[:, context.shape[1] :]
        padding = self.tokenizer.pad_token_id
        # A row that ends before its batch is filled up with padding.
        counts = [max(1, int((row != padding).sum())) for row in new]
        self._measures = batch.rows(lengths, counts)
        return out

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Refused: see the class."""
        raise ValueError(
            f"task {requests[0].task_name} scores loglikelihoods, in which the routers would see "
            "the answer together with the prompt; use a task whose answers are generated."
        )

    loglikelihood_rolling = loglikelihood

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other, in each of them."""
        if self.world_size == 1:
            return tensor
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, tensor.cpu())
        return torch.stack(every)

    def barrier(self) -> None:
        """Nothing: scores are collected from all processes anyway, which waits for them."""


def _out_of_memory(error: RuntimeError) -> bool:
    """On a GPU, or on a CPU, for which PyTorch has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Order:
    """Stands where the harness has its cache, and notes in which order it has answered."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = defaultdict(list)
        self._count = 0

    def add_partial(self, name: str, request: tuple[str, Any], answer: str) -> None:
        """Called by the harness for every row of a batch."""
        self._rows[request[0]].append(self._count)
        self._count += 1

    def places(self, prompts: list[str]) -> list[int]:
        """The row of the batch that each prompt had."""
        return [self._rows[prompt].pop(0) for prompt in prompts]
