"""How much memory a model takes while it answers, from its shape alone: see docs/targets.md for the formula."""

from dataclasses import dataclass

from lop.errors import LopError

# Of each number of the tensors that are computed in float32, whatever the weights' type.
_FLOAT = 4


@dataclass(frozen=True)
class Tower:
    """A vision tower's shape.

    Attributes:
        hidden, neurons: of its blocks.
        head: numbers of one attention head.
        matrices: as wide as `neurons` that its FFN holds at once: three with a gate, two without.
        patch: an image's patches are squares of so many pixels.
        patch_numbers: that the processor makes of one patch.
        merge: the language model sees squares of so many patches as one token.
        least, most: pixels to which the processor scales an image up or down.
    """

    hidden: int
    neurons: int
    head: int
    matrices: int
    patch: int
    patch_numbers: int
    merge: int
    least: int
    most: int


@dataclass(frozen=True)
class Shape:
    """What memory depends on beside the weights.

    Attributes:
        layers, hidden, vocabulary: of the language backbone.
        queries, keys: numbers of all query heads together, and of all key heads (the value heads have as many).
        head: numbers of one head.
        item: bytes of a number of the weights, and of the activations.
        tower: the vision tower.
    """

    layers: int
    hidden: int
    vocabulary: int
    queries: int
    keys: int
    head: int
    item: int
    tower: Tower


@dataclass(frozen=True)
class Load:
    """What the model is to do at once.

    Attributes:
        context: tokens of one sequence: its images', the text's and the answer's.
        images: in each sequence.
        batch: sequences.
        pixels: of each image, before the processor scales it.
    """

    context: int
    images: int = 0
    batch: int = 1
    pixels: int = 2**20

    def __post_init__(self) -> None:
        for name, least in (("context", 1), ("images", 0), ("batch", 1), ("pixels", 1)):
            if not least <= getattr(self, name) < 2**40:
                raise LopError(f"{name} {getattr(self, name)} is not a number from {least} up")

    def image_tokens(self, tower: Tower) -> int:
        """Of one image, as the processor makes them."""
        pixels = min(max(self.pixels, tower.least), tower.most)
        return max(1, round(pixels / (tower.patch * tower.merge) ** 2))


def working_bytes(shape: Shape, load: Load, width: int, *, lost_groups: int = 0) -> int:
    """What is held beside the weights at the worst moment of a run of transformers with `sdpa` attention.

    The prompts are as long as the context and equally long, so that attention needs no mask; no gradients are kept.

    Args:
        width: neurons of the widest FFN.
        lost_groups: key/value heads that pruning took, of all layers together: their keys and values are not kept.

    Raises:
        LopError: the images alone are more tokens than the context.
    """
    tokens = load.context * load.batch
    image_tokens = load.image_tokens(shape.tower)
    if image_tokens * load.images > load.context:
        raise LopError(
            f"{load.images} images of {image_tokens} tokens each are more than the context of {load.context}: "
            "name a larger context, or fewer or smaller images"
        )
    image_tokens *= load.images * load.batch
    patches = image_tokens * shape.tower.merge**2
    pixels = _FLOAT * patches * shape.tower.patch_numbers  # What the processor made, as long as the caller holds it.
    seeing = tokens * shape.item * shape.hidden + patches * _patch_bytes(shape)
    # The tower's last states and what was made of them (twice) stay until the language model is through.
    seen = shape.item * (patches * shape.tower.hidden + 2 * image_tokens * shape.hidden)
    cache = 2 * shape.item * tokens * (shape.layers * shape.keys - lost_groups * shape.head)
    logits = load.batch * shape.vocabulary * (shape.item + 2 * _FLOAT)
    reading = seen + cache + max(tokens * _token_bytes(shape, width), logits)
    return pixels + max(seeing if patches else 0, reading)


def _token_bytes(shape: Shape, width: int) -> int:
    """Of one token in one decoder layer, at that of its moments when the most is held."""
    item, hidden = shape.item, shape.hidden
    # The embeddings and the layer's input; the cosines and sines of its position.
    always = item * (2 * hidden + 2 * shape.head)
    # Normalised in float32: the state and its square.
    norm = 2 * _FLOAT * hidden
    # Queries, keys and values, and three intermediate results of rotating the queries.
    attention = item * (hidden + 4 * shape.queries + 2 * shape.keys)
    # The attention's sum and its normalised copy; the gate's activation, the other half, and their product.
    ffn = item * (2 * hidden + 3 * width)
    return always + max(norm, attention, ffn)


def _patch_bytes(shape: Shape) -> int:
    """Of one patch in one block of the vision tower, at that of its moments when the most is held."""
    item, tower = shape.item, shape.tower
    # The pixels in the weights' type, the block's input; cosines and sines in float32.
    always = item * (tower.patch_numbers + tower.hidden) + 2 * _FLOAT * tower.head
    # Queries, keys and values; queries and keys are rotated in float32, with four intermediate results.
    copies = 0 if item == _FLOAT else 2
    attention = item * 4 * tower.hidden + _FLOAT * (copies + 4) * tower.hidden
    ffn = item * (2 * tower.hidden + tower.matrices * tower.neurons)
    return always + max(attention, ffn)
