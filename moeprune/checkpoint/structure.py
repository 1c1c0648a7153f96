"""Find the experts of a checkpoint in its tensors' names and shapes, one block at a time.

A module is the prefix that experts and router share, such as `model.layers.7.mlp.`; a block is a module with its parts,
named by the prefix up to the layer's index. E stands for the experts of a block.

    one tensor per expert   ...mlp.experts.17.up_proj.weight      dropped, or renumbered
    one for all of them     ...mlp.experts.down_proj [E, H, I]    rows along the first axis; flat: [E*F, H]
    the router's            ...mlp.gate.weight [E, H]             rows, and a tail that is no expert's
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moeprune.checkpoint.headers import Tensor
from moeprune.checkpoint.series import Series, check_complete
from moeprune.errors import InputError

TOWER = re.compile(r"vision|visual|audio|image|speech|talker|code2wav|(^|\.)vit(\.|$)")
EXPERT = re.compile(
    r"(?P<head>(?P<module>(?:.*\.)?)(?P<chunk>chunk_)?experts\."
    r"(?:expert_|local_experts\.|mlp\.|(?:gate_up|gate|up|down)_projs\.)?)(?P<id>\d{1,6})(?P<tail>\..+)"
)
STACKED = re.compile(r"(?P<module>(?:.*?\.)?)(?:experts|switch_mlp|switch_glu)\.(?P<rest>.+)")
LOOSE = re.compile(  # stacked experts that lie in the module itself; only three axes tell them from a dense layer
    r"(?P<module>.*\.(?:moe|mlp|block_sparse_moe|feed_forward|ffn|mixer)\.)"
    r"(?P<rest>(?:input_linear|output_linear|gate_up_proj|gate_proj|up_proj|down_proj|w[123])\b.*)"
)
FLAT = re.compile(r"\.experts\.mlp\.(w1|v1|w2)(\.weight)?$")  # [E*F, H], as megablocks keeps them
ROUTER = re.compile(
    r"(gate|router|primary_router|moe_statics|act_fn)\.|(\w*expert_bias|e_score_correction_bias|router_bias|router_scale)$"
)
ROUTER_ELSEWHERE = re.compile(r"moe\.router\.")  # relative to the layer, where it is not in the experts' module
PER_EXPERT = re.compile(r"(expert_bias|correction_bias|router_bias|router_scale)$")
NO_ROUTER = re.compile(r"router\.(scale|global_scale)$")
SHARED = re.compile(r"shared|share_expert|shexp")
PACKED = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_zero_point|weight_shape|_data\._data|codes|indices|dense_weights)$"
)
FOUR_BIT = re.compile(  # what bitsandbytes keeps beside a flat matrix [n, 1]
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(nf4|fp4))$"
)
HQQ = re.compile(r"\.(W_q|shape)$")  # a grid of values, packed across rows, and the matrix that it means
HQQ_GROUPS = re.compile(r"\.(scale|zero)$")
BLOCK_SCALE = re.compile(r"\.weight_scale(_inv)?$")
ATTENTION = re.compile(r"attn|attention")


class Part(NamedTuple):  # there may be a million; a frozen dataclass takes twice as long to make
    """How one tensor hangs on the experts of its block."""

    tensor: str
    # expert: of one expert | tail: of one that always stays | rows: along `axis` | ids: holds expert numbers
    # made: of a router by bitsandbytes or HQQ, has to be computed (bnb.py, hqq.py)
    kind: str
    expert: int = -1  # kind expert, tail: the expert's number within the block
    around: tuple[str, str] = ("", "")  # kind expert, tail: what comes before the number on disk, and behind it
    axis: int = 0  # kind rows
    rows_per_expert: int = 1  # kind rows: flat layouts [E*F, H]
    tail: int = 0  # kind rows: rows behind the experts' own that always stay, last
    router: bool = False
    share: int = 1  # kinds expert, rows: tensor or row serve this many neighbours, and numbers count such runs
    shift: int = 0  # kind expert: its number on disk starts behind this many times all experts that stay
    blocks: tuple[str, ...] = ()  # kind rows: the leading axis runs over these blocks, each with its own keep-list


@dataclass(frozen=True)
class Block:
    """One router with its experts."""

    name: str  # prefix on disk up to the layer index, such as model.layers.7
    role: str  # trunk | mtp | attention | vision
    experts: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Hints:
    """What only the config and the tables of families.py know."""

    counts: tuple[int, ...]  # numbers of experts that the config names
    depth: int = 0  # layers of the trunk; what lies behind them predicts further tokens
    tail: int = 0
    two_kinds: bool = False
    hidden: int = 0


def is_tower(name: str) -> bool:
    """Whether a tensor or config key belongs to images, sound or speech; their experts are not the language model's."""
    return TOWER.search(name) is not None


def renamed(part: Part, new_expert: int) -> str:
    """The name of a tensor of one expert after renumbering; `new_expert` is the number on disk."""
    before, behind = part.around
    return f"{before}{new_expert}{behind}"


def find_blocks(tensors: Mapping[str, Tensor], hints: Hints) -> list[Block]:
    """All blocks of the language model, in the order of their layers."""
    series = _series(tensors)
    numbered = {name for own in series.values() for one in own for name in one.numbers}
    others = [name for name in tensors if name not in numbered and not is_tower(name)]
    names = sorted([*numbered, *others])
    modules = series.keys() | {module for name in others if (module := _module(tensors[name])) is not None}
    blocks = []
    for module in sorted(modules):
        of_layer = [tensors[name] for name in _under(names, _layer(module))]
        block = _block(module, of_layer, series.get(module, []), hints)
        blocks += _two_kinds(block) if block and hints.two_kinds else [block] if block else []
    return sorted(_named_apart(blocks), key=lambda block: _natural(block.name))


def _series(names: Iterable[str]) -> dict[str, list[Series]]:
    """The routed experts' tensors by module. What must hold for each name is asked once for all of a series."""
    found: dict[tuple[str, str], Series] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            around = (match["head"], match["tail"])
            if around not in found:
                found[around] = Series(match["module"], match["chunk"] is not None, around)
            found[around].numbers[name] = int(match["id"])
    modules: dict[str, list[Series]] = {}
    for around, one in found.items():
        if not any(is_tower(text) or SHARED.search(text) for text in around):
            modules.setdefault(one.module, []).append(one)
    return modules


def _under(names: Sequence[str], layer: str) -> Sequence[str]:
    """Those of the sorted names that lie in the layer; all where there are no layers."""
    if not layer:
        return names
    return names[bisect.bisect_left(names, f"{layer}.") : bisect.bisect_left(names, f"{layer}/")]  # "/" follows "."


def _module(tensor: Tensor) -> str | None:
    """The module whose experts this tensor, which has none's number, belongs to, if any."""
    match = STACKED.fullmatch(tensor.name)
    if match is None and len(tensor.shape) >= 3 and tensor.shape[0] > 1:
        match = LOOSE.fullmatch(tensor.name)
    return None if match is None or SHARED.search(tensor.name) else match["module"]


def _layer(module: str) -> str:
    """The module's prefix up to its last number; the module itself where it has none."""
    match = re.match(r"(?:.*\.)?\d+(?=\.)", module)
    return match[0] if match else module.rstrip(".")


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by size, which for digits is first of all their length."""
    return [(len(piece) if piece.isdigit() else 0, piece) for piece in re.split(r"(\d+)", name)]


def _block(module: str, tensors: Sequence[Tensor], series: Sequence[Series], hints: Hints) -> Block | None:
    """The block of one module from all tensors of its layer; None when it is a dense layer after all."""
    layer = _layer(module)
    experts = _count_experts(module, tensors, series, hints)
    if experts < 1:
        raise InputError(f"{module}* looks like experts, but neither shapes nor config.json say how many there are")
    check_complete(series, experts * (2 if hints.two_kinds else 1), tensors)
    numbered = {name: one for one in series for name in one.numbers}
    runs = {number for one in series if one.chunk for number in one.numbers.values()}
    parts = []
    for tensor in tensors:
        if one := numbered.get(tensor.name):
            parts.append(_expert_part(tensor.name, one, experts, experts // len(runs) if one.chunk else 1))
        elif part := _part(tensor, module, layer, experts, hints):
            parts.append(part)
    if not any(part.router and _is_matrix(part, tensors) for part in parts):
        if not any(EXPERT.fullmatch(t.name) or STACKED.fullmatch(t.name) for t in tensors if t.name.startswith(module)):
            return None
        raise InputError(
            f"{module}* holds {experts} experts but no router was found beside them; "
            "add the router's name to ROUTER in moeprune/checkpoint/structure.py"
        )
    return Block(layer, _role(layer, hints.depth), experts, tuple(parts))


def _is_matrix(part: Part, tensors: Sequence[Tensor]) -> bool:
    return any(tensor.name == part.tensor and len(tensor.shape) > 1 for tensor in tensors)


def _count_experts(module: str, tensors: Sequence[Tensor], series: Sequence[Series], hints: Hints) -> int:
    """E of a module: the highest number there is, or the size that most stacked tensors begin with."""
    ids = [number for one in series if not one.chunk for number in one.numbers.values()]
    if ids:
        found = max(ids) + 1
        if hints.two_kinds:
            return found // 2
        return found - hints.tail if found - hints.tail in hints.counts else found
    stacked = [t for t in tensors if _own(STACKED, t, module) or _own(LOOSE, t, module)]
    first = Counter(t.shape[0] for t in stacked if len(t.shape) >= 3)
    if first:
        return first.most_common(1)[0][0]
    rows = {t.shape[0] for t in tensors if t.name.startswith(module) and t.shape}
    return next((count for count in hints.counts if count in rows), max(hints.counts, default=0))


def _own(pattern: re.Pattern[str], tensor: Tensor, module: str) -> re.Match[str] | None:
    match = pattern.fullmatch(tensor.name)
    return match if match and match["module"] == module and not SHARED.search(match["rest"]) else None


def _part(tensor: Tensor, module: str, layer: str, experts: int, hints: Hints) -> Part | None:
    """What a tensor of the layer, of no single expert, has to do with them; None when it is to be copied as it is."""
    inside = tensor.name.startswith(module)
    local = tensor.name[len(module) :]
    if SHARED.search(local if inside else tensor.name) or NO_ROUTER.search(tensor.name):
        return None
    if _own(STACKED, tensor, module) or _own(LOOSE, tensor, module):
        return _stacked_part(tensor, experts)
    if (inside and ROUTER.match(local)) or ROUTER_ELSEWHERE.match(tensor.name[len(layer) + 1 :]):
        return _router_part(tensor, experts, hints)
    if inside and module != f"{layer}.":
        _refuse_unknown(tensor, experts, hints)
    return None


def _expert_part(name: str, series: Series, experts: int, share: int) -> Part:
    number = series.numbers[name]
    return Part(name, "expert" if number < experts else "tail", number, series.around, share=share)


def _stacked_part(tensor: Tensor, experts: int) -> Part | None:
    """A tensor of all experts: one row each, or several; a scale or bias that all share is copied."""
    router = "router" in tensor.name or "correction_bias" in tensor.name
    if tensor.shape and tensor.shape[0] == experts:
        return Part(tensor.name, "rows", router=router)
    if FLAT.search(tensor.name) and tensor.shape and tensor.shape[0] % experts == 0:
        return Part(tensor.name, "rows", rows_per_expert=tensor.shape[0] // experts)
    if len(tensor.shape) <= 1 or (tensor.shape[0] == 1 and experts not in tensor.shape):
        return None
    raise InputError(
        f"{tensor.name} has the shape {list(tensor.shape)}, which does not begin with the {experts} experts of its "
        "block; if its layout is a new one, add it to moeprune/checkpoint/structure.py"
    )


def _router_part(tensor: Tensor, experts: int, hints: Hints) -> Part | None:
    """A tensor of the router, with one row (or column) per expert, or none of the experts' business."""
    if tensor.name.endswith("tid2eid"):
        return Part(tensor.name, "ids", router=True)
    if FOUR_BIT.search(tensor.name):
        return None if tensor.name.endswith(".quant_map") else Part(tensor.name, "made", router=True)
    if HQQ.search(tensor.name):
        return Part(tensor.name, "made", router=True)
    in_column = tensor.shape[1:] == (1,) and tensor.shape[0] % experts == 0
    if in_column and (tensor.dtype == "U8" or HQQ_GROUPS.search(tensor.name)):  # bitsandbytes, HQQ
        return Part(tensor.name, "rows", rows_per_expert=tensor.shape[0] // experts, router=True)
    one_row = tensor.shape[:1] == (1,) and not BLOCK_SCALE.search(tensor.name)  # whose columns are blocks of inputs
    axis = 1 if hints.two_kinds or one_row else 0
    size = tensor.shape[axis] if axis < len(tensor.shape) else 0
    if math.prod(tensor.shape) > 1 and size in (experts, experts + hints.tail):
        return Part(tensor.name, "rows", axis=axis, tail=size - experts, router=True)
    if PACKED.search(tensor.name) or (BLOCK_SCALE.search(tensor.name) and size > 1):
        raise InputError(f"{tensor.name}: this router is packed across experts and cannot be cut; keep it unquantized")
    if math.prod(tensor.shape) > 1 and not BLOCK_SCALE.search(tensor.name):
        _refuse_odd_router(tensor, experts, hints)
    return None


def _refuse_odd_router(tensor: Tensor, experts: int, hints: Hints) -> None:
    """What a router owns may be none of the experts' business, such as a norm; it may not be half understood."""
    own = {experts, experts + hints.tail} - {hints.hidden}
    per_expert = PER_EXPERT.search(tensor.name) is not None
    rows = len(tensor.shape) == 2 and tensor.shape[1] == hints.hidden and experts < tensor.shape[0] < 2 * experts
    if own & set(tensor.shape) or per_expert or rows:
        raise InputError(
            f"{tensor.name} {list(tensor.shape)} belongs to a router of {experts} experts and has no row for each; "
            "rows of another kind that always stay belong in TAILS in moeprune/checkpoint/families.py"
        )


def _refuse_unknown(tensor: Tensor, experts: int, hints: Hints) -> None:
    """The safety net: what has a size E inside the module must have been understood."""
    suspicious = {experts, experts + hints.tail} - {hints.hidden}
    if suspicious & set(tensor.shape):
        raise InputError(
            f"{tensor.name} {list(tensor.shape)} lies among experts and has a size of {experts}, but is not known; "
            "add it to ROUTER or SHARED in moeprune/checkpoint/structure.py"
        )


def _role(layer: str, depth: int) -> str:
    """mtp for what predicts further tokens: named so, or a layer behind the last."""
    behind = re.search(r"(?:^|\.)layers\.(\d{1,6})$", layer)
    if re.search(r"(^|\.)(mtp|nextn)", layer) or (behind and 0 < depth <= int(behind[1])):
        return "mtp"
    return "trunk"


def _named_apart(blocks: Sequence[Block]) -> Iterator[Block]:
    """Two routers in one layer (experts in the attention too): the attention's block takes the longer name."""
    taken: set[str] = set()
    counts = Counter(block.name for block in blocks)
    for block in blocks:
        module = next((m["module"] for p in block.parts if (m := STACKED.fullmatch(p.tensor))), "")
        if counts[block.name] > 1 and ATTENTION.search(module):
            yield replace(block, name=module.rstrip("."), role="attention")
            continue
        if block.name in taken:
            raise InputError(f"{block.name} has two groups of experts ({module}* is one), which no known model has")
        taken.add(block.name)
        yield block


def _two_kinds(block: Block) -> list[Block]:
    """Split text experts 0..E-1 from image experts E..2E-1, which have a router column each."""
    vision = f"{block.name}.vision"
    first, second = [], []
    for part in block.parts:
        if part.kind == "tail":
            second.append(part._replace(kind="expert", expert=part.expert - block.experts, shift=1))
        elif part.tensor.endswith("weight_1"):
            second.append(part)
        else:
            both = "moe_statics" in part.tensor
            first.append(part._replace(blocks=(block.name, vision)) if both else part)
    return [replace(block, parts=tuple(first)), Block(vision, "vision", block.experts, tuple(second))]
