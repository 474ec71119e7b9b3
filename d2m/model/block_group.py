"""Mixture of Blocks: a router keeps kappa of a group's m consecutive blocks, sample by sample.

Shape letters: B batch, T image tokens, L text tokens, D width, m blocks of a group,
W = m - kappa + 1 windows.
A group sits in the model's block list where its first block was and takes a block's own arguments;
the places of its other blocks hold `SkippedBlock`, so that indices stay the dense model's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2m.model.routing import Gate, routing_dtype

ROUTER_STD = 0.1  # ours: times D^-1/2, as the experts' gates start

Streams = tuple[Tensor, Tensor]
Read = tuple[Tensor, Tensor, Tensor, Tensor | None]  # image, text, temb, mask of the text
TEXT_MASK = "encoder_hidden_states_mask"  # diffusers' name of it [B, L], which blocks get
JOINT_MASK = "attention_mask"  # of text and image [B, L + T], which Chroma's blocks get
# What blocks get with a row a sample, beside their streams: temb, or what a model makes of it.
PER_SAMPLE = (
    *("temb", "temb_mod", "temb_mod_img", "temb_mod_txt", TEXT_MASK, JOINT_MASK),
    *("attn_mask", "freqs_cis", "adaln_input"),  # Z-Image's
)
IMAGE, TEXT = "hidden_states", "encoder_hidden_states"


class Router(nn.Module):
    """alpha * W_x [x_pooled, c_pooled] + (1 - alpha) * W_y y -> a logit per block [B, m] (read).

    x are the image tokens entering the group and c the text tokens, pooled by the mean over tokens;
    y is the global embedding that feeds AdaLN (`temb`), of D or `width` numbers. No biases: 3 m D
    weights. Computed in float32 (float64 for float64 tokens), autocast or not.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self, dim: int, blocks: int, alpha: float, dtype=None, device=None, width: int | None = None
    ):
        super().__init__()
        self.alpha = alpha
        self.tokens = Gate(2 * dim, blocks, dtype, device)  # W_x
        self.embedding = Gate(width or dim, blocks, dtype, device)  # W_y
        for linear in (self.tokens, self.embedding):
            nn.init.normal_(linear.weight, std=ROUTER_STD * dim**-0.5)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D], [B, L, D], [B, D] -> [B, m]. With alpha 0 no token is looked at.

        mask [B, L]: true where text is, for families that fill texts up and mask them.
        """
        logits = (1 - self.alpha) * self.embedding(temb)
        if self.alpha:
            pooled = pool(hidden_states, encoder_hidden_states, mask, routing_dtype(temb))
            logits = logits + self.alpha * self.tokens(pooled)
        return logits


class Conditions:
    """What a forward of the model tells its groups that their blocks are not given.

    temb [B, D], where blocks get modulation in its place, or all N vectors of modulation [B, N, D],
    of which a block gets some; first: tokens of the stream that comes first, where both come joined
    (`tokens_of` finds it among the model's inputs). Two hooks, which a copy of the model takes
    along, keep them up to date.
    """

    def __init__(self, tokens_of: Callable[[Mapping[str, Any]], int]) -> None:
        self.temb: Tensor | None = None
        self.tokens_of = tokens_of
        self.first = 0

    def attach(self, model: nn.Module, embedder: str | None) -> None:
        """Watch a model and its submodule that makes temb, where blocks are not given it."""
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        if embedder:
            model.get_submodule(embedder).register_forward_hook(self.embedded)

    def begin(self, module: nn.Module, args: Any, given: Mapping[str, Any]) -> None:
        """Before the model's forward."""
        self.first = self.tokens_of(named_inputs(module, args, given))

    def embedded(self, module: nn.Module, args: Any, temb: Tensor) -> None:
        """After its embedder's."""
        self.temb = temb


class Members(nn.ModuleDict):
    """Blocks by dense index: a number finds one too, as in the model's own lists of blocks."""

    def __getitem__(self, key: int | str) -> nn.Module:
        return super().__getitem__(str(key))


class BlockGroup(nn.Module):
    """m consecutive blocks of which every sample runs kappa neighbours; the others are skipped.

    `blocks` by dense index, in order. Attributes: `kappa`, 1..m, may be changed at any time, m runs
    all of them as the dense model does, without a router; `record = True` keeps the windows' logits
    of the last call, [B, W] with their graph, in `last_logits` (None where kappa = m).
    `any_process`: set where processes share the blocks' weights; which flags any of them raises.
    `conditions`: set where blocks are not given all that the router reads. `vectors`: of all of
    modulation those of each block, where they are what blocks get as temb. `reads`: a family's own
    way to `read`. width: of temb, D by default.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        dim: int,
        kappa: int,
        alpha: float,
        width: int | None = None,
    ):
        super().__init__()
        weight = next(parameter for block in blocks.values() for parameter in block.parameters())
        self.blocks = Members({str(index): block for index, block in blocks.items()})
        self.names = _parameters(type(next(iter(blocks.values()))).forward)
        self.router = Router(dim, len(blocks), alpha, weight.dtype, weight.device, width)
        self.kappa = kappa
        self.record = False
        self.last_logits: Tensor | None = None
        self.any_process: Callable[[list[bool]], list[bool]] | None = None
        self.conditions: Conditions | None = None
        self.vectors: Sequence[Sequence[int]] = ()
        self.reads: Callable[[Mapping[str, Any], int], Read] | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """The blocks' indices in the dense model's list."""
        return tuple(int(name) for name in self.blocks)

    def window_logits(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The mean logit of every window of kappa neighbours, [B, W] (ours); the largest wins."""
        logits = self.router(hidden_states, encoder_hidden_states, temb, mask)
        return logits.unfold(-1, self.kappa, 1).mean(-1)

    def read(self, given: Mapping[str, Any]) -> Read:
        """What the router reads of a block's keywords: image, text, temb, mask of the text."""
        length = 0 if self.conditions is None else self.conditions.first
        if self.reads is not None:
            return self.reads(given, length)
        image, text, temb = given[IMAGE], given.get(TEXT), given.get("temb")
        if text is None:
            assert self.conditions is not None, "joined streams without their text's length"
            text, image = image[:, :length], image[:, length:]
        if self.conditions is not None:
            assert self.conditions.temb is not None, "blocks ran without their model"
            temb = self.conditions.temb
            temb = temb.mean(1) if self.vectors else temb
        return image, text, temb, text_mask(given, length)

    def of_block(self, offset: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The group's keywords as the block at `offset` takes them, with vectors of its own."""
        if not self.vectors:
            return dict(given)
        assert self.conditions is not None and self.conditions.temb is not None
        return {**given, "temb": self.conditions.temb[:, list(self.vectors[offset])]}

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **others: Any,
    ) -> Streams | Tensor:
        """As a block: [B, T, D], [B, L, D], temb [B, D] -> (text [B, L, D], image [B, T, D]).

        Streams that come joined, [B, L + T, D] and None, are returned so. Each block is called at
        most once, with the samples that chose it. What else a block takes it gets as it came, given
        by name, or by place in the block's own order: rotary tables are of all samples, of tensors
        in a dict (`joint_attention_kwargs`) those with first dimension B hold a row per sample, as
        do temb or the modulation made of it, and the mask of the text, which the router heeds.
        A block that only another process has samples for runs here with one sample and no effect:
        gathering its weights and reducing their gradients takes all processes.
        """
        given = dict(zip(self.names, (hidden_states, encoder_hidden_states, *args)))
        others = given | others  # made here, not by named_inputs: a compiler cannot read signatures
        joined = others.get(TEXT) is None  # by place there may be something else
        names = self.names[:1] if joined else (TEXT, IMAGE)
        streams = tuple(others[name] for name in names)
        self.last_logits = None
        batch, offsets = hidden_states.shape[0], range(len(self.blocks))
        chosen, shares = [list(range(batch)) for _ in offsets], None
        if self.kappa < len(self.blocks):
            logits = self.window_logits(*self.read(others))
            self.last_logits = logits if self.record else None
            if torch.compiler.is_compiling() and not logits.requires_grad:
                return self._compiled(logits, names, streams, others)
            starts = logits.detach().argmax(-1).tolist()  # the one wait for the device
            chosen = [[b for b in range(batch) if 0 <= i - starts[b] < self.kappa] for i in offsets]
            shares = torch.softmax(logits, dim=-1) if logits.requires_grad else None
        # With weights shared over processes, a block runs in all of them or in none.
        wanted = [bool(rows) for rows in chosen]
        if self.any_process is not None and self.kappa < len(self.blocks):
            wanted = self.any_process(wanted)
        for offset, (block, rows) in enumerate(zip(self.blocks.values(), chosen)):
            if not wanted[offset]:
                continue
            # No sample here chose it: one runs without effect, since gathering is for all.
            idle, rows = not rows, rows or [0]
            part = len(rows) < batch
            index = torch.tensor(rows, device=hidden_states.device) if part else slice(None)
            before = [stream[index] for stream in streams]
            given = dict(zip(names, before))
            # All rows are the tensor itself: shared modulation knows temb again.
            own = self.of_block(offset, others)
            rowed = [name for name in PER_SAMPLE if own.get(name) is not None and part]
            given |= {name: own[name][index] for name in rowed}
            named = {name: _dict_rows(each, index, batch) for name, each in own.items()}
            after = block(**named | given)
            after = [after] if joined else after
            if idle:
                after = [old + 0 * new for old, new in zip(before, after)]
                for module in block.modules():
                    if hasattr(module, "last_logits"):
                        module.last_logits = None  # nobody chose these experts
            elif shares is not None:
                windows = slice(max(0, offset - self.kappa + 1), offset + 1)  # those with the block
                share = shares[index, windows].sum(-1)
                after = [straight_through(*pair, share) for pair in zip(before, after)]
            if part:
                pairs = zip(streams, after)
                after = [old.to(new.dtype).index_copy(0, index, new) for old, new in pairs]
            streams = tuple(after)
        return streams[0] if joined else streams  # type: ignore[return-value]

    def _compiled(
        self,
        logits: Tensor,
        names: tuple[str, ...],
        streams: tuple[Tensor, ...],
        others: Mapping[str, Any],
    ) -> Streams | Tensor:
        """As the rest of `forward`, without a wait for the device, which would break the graph.

        A block that anybody chose runs with all samples, and only those that chose it keep what it
        made.
        """
        starts = logits.argmax(-1)
        for offset, block in enumerate(self.blocks.values()):
            mine = ((starts <= offset) & (offset < starts + self.kappa))[:, None, None]
            own = self.of_block(offset, others)

            def run(
                *old: Tensor, block: Any = block, mine: Any = mine, own: Any = own
            ) -> tuple[Tensor, ...]:
                after = block(**{**own, **dict(zip(names, old))})
                after = after if len(names) > 1 else (after,)
                return tuple(torch.where(mine, *pair).contiguous() for pair in zip(after, old))

            def passed(*old: Tensor) -> tuple[Tensor, ...]:
                return tuple(stream.contiguous().clone() for stream in old)

            streams = torch.cond(mine.any(), run, passed, streams)
        return streams if len(names) > 1 else streams[0]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"kappa={self.kappa}"


class SkippedBlock(nn.Module):
    """Where a block was that a group holds, or that is left out: hands the streams on.

    block: the one that was there; whether it takes the text beside the image.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.apart = TEXT in _parameters(type(block).forward)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Streams | Tensor:
        if not self.apart or encoder_hidden_states is None:  # joined
            return hidden_states
        return encoder_hidden_states, hidden_states


def named_inputs(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What a block is called with, by its own names: diffusers' gradient checkpointing, unlike its
    forward pass, gives all by place."""
    names = block.names if isinstance(block, BlockGroup) else _parameters(type(block).forward)
    return dict(zip(names, args)) | dict(kwargs)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self


def text_mask(given: Mapping[str, Any], text_tokens: int = 0) -> Tensor | None:
    """Of what a model or a block is called with the mask of the text [B, L], None without one.

    text_tokens: L, for a block that gets both streams joined.
    """
    own: Tensor | None = given.get(TEXT_MASK)
    joint, text = given.get(JOINT_MASK), given.get(TEXT)
    if own is not None or joint is None:
        return own
    return joint[:, : text_tokens if text is None else text.shape[1]]


def straight_through(before: Tensor, after: Tensor, share: Tensor) -> Tensor:
    """`after` in value; the router gets the gradient of `before + share * (after - before)` (ours).

    before, after [B, T, D]; share [B]: the probability of the windows that run this block. Blocks
    that were not chosen are not run for it, so training costs what inference does.
    """
    slack = (share - share.detach()).to(after.dtype)[:, None, None]
    return after + slack * (after - before).detach()


def block_groups(model: nn.Module) -> dict[str, BlockGroup]:
    """Every BlockGroup of the model by its name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BlockGroup)}


def set_kappa(model: nn.Module, kappa: int | None) -> None:
    """Let every group keep `kappa` of its blocks, None all; ValueError unless each has as many."""
    groups = block_groups(model).values()
    for group in groups:
        if kappa is not None and not 1 <= kappa <= len(group.blocks):
            raise ValueError(
                f"kappa={kappa} is out of range; this model's groups take 1 to "
                f"{min(len(each.blocks) for each in groups)}."
            )
    for group in groups:
        group.kappa = len(group.blocks) if kappa is None else kappa


def pool(
    image: Tensor, text: Tensor, mask: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The means of both streams over tokens, side by side: [B, T, D], [B, L, D] -> [B, 2 D].

    mask [B, L]: true for the tokens of the text that count.
    """
    dtype = dtype or image.dtype
    if mask is None:
        words = text.mean(1, dtype=dtype)
    else:
        share = mask.to(dtype)[..., None]
        words = (text.to(dtype) * share).sum(1) / share.sum(1)
    return torch.cat([image.mean(1, dtype=dtype), words], dim=-1)


def _dict_rows(value: Any, index: Any, batch: int) -> Any:
    """Of a dict the rows `index`; anything else as it is."""
    return _rows(value, index, batch) if isinstance(value, dict) else value


def _rows(value: Any, index: Any, batch: int) -> Any:
    """The rows `index` of every tensor inside `value` that has one per sample."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _rows(each, index, batch) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return type(value)(_rows(each, index, batch) for each in value)  # type: ignore[call-arg]
    return value
