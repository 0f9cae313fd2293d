"""What the page says of the paper, section by section: nothing here is a result of ours."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LIMITS", "PLACES", "SECTIONS", "Section"]


class Section(NamedTuple):
    """A part of the page: its picture and sentence have this name, too."""

    name: str
    title: str
    paper: str


SECTIONS = (
    Section(
        "sparsification",
        "When head after head turns sparse (Figure 2, Table 5)",
        "Heads of Llama-3.1-8B turn sparse one after the other, those with the lowest retrieval "
        "scores first. Question answering falls to about 56 to 61 % of its score, summarization "
        "and code stay above 92 %.",
    ),
    Section(
        "retrieval",
        "Which heads retrieve (Equation 9)",
        "A head's retrieval score is the attention of the prompt's last token on the needle. The "
        "paper ranks heads by it and shows no scores.",
    ),
    Section(
        "targets",
        "Other targets (Figure 7)",
        "A lower target on sensitive tasks gives them more full heads and, at 0.4, a score above "
        "the backbone's; what the routers reach does not match the target exactly.",
    ),
    Section(
        "lengths",
        "Up to four times the trained length (Tables 2, 9 and 10; Figures 8 and 12)",
        "On RULER from 8K to 256K, four times the trained 64K, elastic attention scores highest of "
        "the sparse methods, and MoBA and NSA lose most of their score at 256K.",
    ),
    Section(
        "effective",
        "All methods by what they leave out (Figures 1, 8 and 12)",
        "Ω_ESR compares methods that select blocks with those that switch heads. The paper's "
        "elastic variants lie above the others at comparable Ω_ESR.",
    ),
    Section(
        "modes",
        "Other pairs of modes (Tables 1, 4 and 8)",
        "With XAttention in place of streaming heads (FA-XA) the long retrieval tasks gain; with "
        "XAttention in place of full heads (XA-SSA) Qwen3-4B loses less than a point, the 8B "
        "models a few.",
    ),
    Section(
        "routing",
        "Where the routers send heads (Figures 6 and 11)",
        "In Qwen3 some heads of the middle and upper layers are in retrieval mode for every task, "
        "many are always sparse, and the rest switch; in Llama hardly any is fixed.",
    ),
    Section(
        "similarity",
        "How alike tasks look to a router (Figures 5 and 9)",
        "Before the task MLP of the first layer, pooled keys of different tasks are nearly "
        "parallel; after it, they are much less alike.",
    ),
    Section(
        "training",
        "A training run (Figure 13)",
        "The language modelling loss settles, the sparsity penalty falls within the first 100 "
        "steps, and the tasks' Ω_MSR drift apart.",
    ),
    Section(
        "hidden",
        "The router's hidden size (Table 3)",
        "From 2 to 8 times the head dimension the average score changes by little more than a "
        "point; 8 is best, 4 the default.",
    ),
    Section(
        "pooling",
        "How many tokens the router pools (Figure 14)",
        "Beyond 100 tokens at either end nothing is gained, and pooling all of them can cost "
        "a little.",
    ),
    Section(
        "speed",
        "Speed (Figures 4, 8, 10 and 12)",
        "One fused launch beats one kind of head after the other; the router takes 0.2 ms at any "
        "length; prefill of an 8B model is up to 3.3 times as fast with XA-SSA at 256K.",
    ),
)

LIMITS = (
    "The model has 6.6 million parameters and 4,096 tokens of context. It shows whether the method "
    "does what it says, not what it gains on a large model.",
    "What needs full heads depends on the backbone's own training. Half of that of the model that "
    "ships ran with streaming heads, so its text is robust to them. That of plain.yaml has only "
    "seen full attention, and its text needs more full heads than retrieval does.",
    "The tasks are synthetic retrieval in real text, and the continuation of real text. There are "
    "no LongBench tasks here.",
    "DuoAttention and PruLong are trained as the routers are: on the same samples, for as many "
    "steps. Their papers train longer. PruLong is trained at one share per seed; at other shares "
    "its gates are cut, which its paper does not do.",
    "The best of the random tables is chosen by the very samples that score it, which favours it.",
    "XAttention, MoBA, InfLLM-V2, NSA's selected branch and TriangleMix run as they are, without "
    "training; the paper trains the backbone's projections for MoBA, NSA and InfLLM-V2. Their "
    "sizes are those of the paper divided by 16, as the context is.",
    "Beyond 4,096 tokens the positions are ones that the backbone has never seen. It runs there as "
    "it is, and also with YaRN, which squeezes positions into the range it knows. What full "
    "attention loses there is the backbone's limit and not one of sparse heads.",
    "Ablations have one seed each unless the tables say otherwise, so small differences mean "
    "nothing.",
    "Speed is not measured here: a tiny model does not tell. The figures are of the library's "
    "benchmarks at the sizes of an 8B model.",
)

PLACES = (
    ("Figure 1", "front, effective"),
    ("Figure 2, Table 5", "sparsification"),
    ("Figure 3", "a drawing of the method; nothing to measure"),
    ("Figure 4, Algorithm 1", "speed"),
    ("Figures 5 and 9", "similarity"),
    ("Figures 6 and 11", "routing"),
    ("Figure 7", "targets"),
    ("Figures 8 and 12", "lengths, effective, speed"),
    ("Figure 10", "speed"),
    ("Figure 13", "training"),
    ("Figure 14", "pooling"),
    ("Figures 15 to 17", "examples"),
    ("Tables 1, 7 and 8", "tasks"),
    ("Tables 2, 9 and 10", "lengths"),
    ("Table 3", "hidden"),
    ("Table 4", "modes"),
    ("Table 6", "made: the recipe"),
)
