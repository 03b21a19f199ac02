"""What llama.cpp says: its Python package's plain functions, with every token's logits, and images as embeddings."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

MARKER = "<__media__>"
SAID: list[str] = []


@cache
def log_callback() -> Any:
    """One for all, kept for as long as the process lives: llama.cpp logs to it whatever is open."""
    from llama_cpp import llama_cpp as api

    return api.llama_log_callback(lambda level, text, data: SAID.append(text.decode(errors="replace")))


class Llama:
    """A GGUF file in llama.cpp, on one thread of the CPU.

    Args:
        file: the language model's.
        context: most tokens of a sequence.
        repacked: whether weights are put in the order that the machine's kernels like; those for AMX crash on some
            quantised rows (seen at 1,088 values, version 0.3.36).

    Raises:
        RuntimeError: llama.cpp refuses the file; says with which words.
    """

    def __init__(self, file: Path, *, context: int = 512, repacked: bool = True) -> None:
        from llama_cpp import llama_cpp as api

        self.api: Any = api
        self.said = SAID
        SAID.clear()
        api.llama_log_set(log_callback(), ctypes.c_void_p(0))
        model = api.llama_model_default_params()
        model.n_gpu_layers = 0
        model.use_extra_bufts = repacked
        self.model = api.llama_model_load_from_file(str(file).encode(), model)
        if not self.model:
            raise RuntimeError("".join(self.said))
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = 1
        self.context = api.llama_init_from_model(self.model, settings)
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.words = api.llama_vocab_n_tokens(self.vocabulary)

    def __enter__(self) -> "Llama":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, special ones by their names."""
        data = text.encode()
        room = (self.api.llama_token * (len(data) + 8))()
        count = self.api.llama_tokenize(self.vocabulary, data, len(data), room, len(room), False, True)
        return list(room[:count])

    def forget(self) -> None:
        """Begins a new sequence."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def read(self, tokens: Sequence[int], start: int = 0) -> np.ndarray:
        """The logits [T, V] of tokens that stand at `start` and after."""
        values = (self.api.llama_token * len(tokens))(*tokens)
        positions = (self.api.llama_pos * len(tokens))(*range(start, start + len(tokens)))
        return self._decode(len(tokens), positions, token=values)

    def see(self, embeddings: np.ndarray, positions: np.ndarray) -> None:
        """Takes an image's embeddings [T, H] in, at positions [3, T] in time, height and width."""
        count = len(embeddings)
        values = np.ascontiguousarray(embeddings, np.float32)
        places = np.concatenate([positions, np.zeros((1, count))]).astype(np.int32).reshape(-1)
        self._decode(
            count,
            places.ctypes.data_as(ctypes.POINTER(self.api.llama_pos)),
            embd=values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        )

    def _decode(self, count: int, positions: Any, **given: Any) -> np.ndarray:
        one = (self.api.llama_seq_id * 1)(0)
        batch = self.api.llama_batch(
            n_tokens=count,
            pos=positions,
            n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
            seq_id=(ctypes.POINTER(self.api.llama_seq_id) * count)(
                *[ctypes.cast(one, ctypes.POINTER(self.api.llama_seq_id))] * count
            ),
            logits=(ctypes.c_int8 * count)(*[1] * count),
            **given,
        )
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: {code}; {''.join(self.said[-3:])}")
        logits = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (count, self.words)).copy()


def quantise(source: Path, out: Path) -> None:
    """Has llama.cpp's own quantiser write a float16 file anew, mostly in Q4_K, as `llama-quantize … q4_k_m` does.

    Raises:
        RuntimeError: it refuses the file.
    """
    from llama_cpp import llama_cpp as api

    api.llama_log_set(log_callback(), ctypes.c_void_p(0))
    settings = api.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = 1, api.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if code := api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama_model_quantize: {code}")


class Eyes:
    """A GGUF file of a vision tower in llama.cpp, beside its language model."""

    def __init__(self, file: Path, llama: Llama) -> None:
        from llama_cpp import mtmd_cpp as api

        self.api: Any = api
        self.llama = llama
        api.mtmd_helper_log_set(log_callback(), ctypes.c_void_p(0))
        settings = api.mtmd_context_params_default()
        settings.use_gpu, settings.n_threads, settings.warmup = False, 1, False
        self.context = api.mtmd_init_from_file(str(file).encode(), llama.model, settings)
        if not self.context:
            raise RuntimeError("".join(llama.said))

    def __enter__(self) -> "Eyes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.api.mtmd_free(self.context)

    def look(self, text: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The embeddings [T, H] of an image [height, width, 3], and the logits [V] at the end of a text with it.

        Args:
            text: has `MARKER` where the image is; llama.cpp sets the tokens around it.
            pixels: bytes.
        """
        data = np.ascontiguousarray(pixels, np.uint8)
        height, width, _ = data.shape
        bitmap = self.api.mtmd_bitmap_init(width, height, (ctypes.c_uint8 * data.size)(*data.reshape(-1)))
        chunks = self.api.mtmd_input_chunks_init()
        said = text.encode()
        asked = self.api.mtmd_input_text(text=said, text_len=len(said), add_special=False, parse_special=True)
        bitmaps = (self.api.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if code := self.api.mtmd_tokenize(self.context, chunks, ctypes.byref(asked), bitmaps, 1):
            raise RuntimeError(f"mtmd_tokenize: {code}")
        found = [self.api.mtmd_input_chunks_get(chunks, i) for i in range(self.api.mtmd_input_chunks_size(chunks))]
        image = self.api.MTMD_INPUT_CHUNK_TYPE_IMAGE
        (chunk,) = [one for one in found if self.api.mtmd_input_chunk_get_type(one) == image]
        if code := self.api.mtmd_encode_chunk(self.context, chunk):
            raise RuntimeError(f"mtmd_encode_chunk: {code}")
        count = self.api.mtmd_input_chunk_get_n_tokens(chunk)
        hidden = self.llama.api.llama_model_n_embd(self.llama.model)
        embeddings = np.ctypeslib.as_array(self.api.mtmd_get_output_embd(self.context), (count, hidden)).copy()
        self.llama.forget()
        end = self.llama.api.llama_pos(0)
        lama = self.llama.api
        if code := self.api.mtmd_helper_eval_chunks(
            self.context, self.llama.context, chunks, 0, 0, 512, True, ctypes.byref(end)
        ):
            raise RuntimeError(f"mtmd_helper_eval_chunks: {code}")
        logits = np.ctypeslib.as_array(lama.llama_get_logits_ith(self.llama.context, -1), (self.llama.words,)).copy()
        self.api.mtmd_input_chunks_free(chunks)
        self.api.mtmd_bitmap_free(bitmap)
        return embeddings, logits
