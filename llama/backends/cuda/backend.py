"""A model on a CUDA device, computed by the Triton kernels: what the engine may ask of them."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.backends.cuda import sampling
from llama.backends.cuda.available import LARGEST_VOCAB
from llama.backends.cuda.filters import filter_logits
from llama.backends.cuda.graphs import CudaGraphs
from llama.backends.cuda.layers import GpuLayers, held
from llama.backends.cuda.matmul import matmul, matmul_in
from llama.backends.eager import EagerBackend, is_nccl
from llama.cache import ForwardBatch
from llama.config import ModelArgs
from llama.feed_forward import ExpertsFeedForward
from llama.model import Transformer
from llama.quantization.planar import MAX_DEQUANTIZED_GPU_VALUES, PlanarWeight
from llama.quantization.weights import LowRank
from llama.sampling import FilterTensors, SamplingTensors, TokenSampler, TorchSampler

MAX_HEAD_DIM = 256  # the kernels hold a whole head


class CudaBackend(EagerBackend):
    """Computes a Transformer by kernels that find all lengths on the device, so that a step can be a CUDA graph."""

    name = "cuda"
    own_kernels = True
    weight_cls = PlanarWeight
    keeps_stored_blocks = True
    quantize_modes = ("int8", "int4", "fp8")
    max_prefill_tokens = 8192
    dequantized_values = MAX_DEQUANTIZED_GPU_VALUES

    @staticmethod
    def computes(args: ModelArgs) -> bool:
        """Tell whether the kernels compute a model of this architecture."""
        return args.head_dim <= MAX_HEAD_DIM

    def bind(self, model: Transformer) -> None:
        for module in model.modules():
            if isinstance(module, LowRank):
                module.matmul = matmul_in
            elif isinstance(module, ExpertsFeedForward):  # scores of a token hang on no others, as all its products
                module.gate.matmul = matmul_in
        self._layers = GpuLayers(model)
        super().bind(model)

    @property
    def captures_graphs(self) -> bool:
        parallel = self.model.parallel
        if self.model.args.experts is not None:  # which weights are read depends on the tokens
            return False
        return self._samples and is_nccl(parallel.group if parallel.size > 1 else None)

    def graph_capture(self) -> CudaGraphs:
        return CudaGraphs(self.device)

    def run_layers(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        return self._layers(tokens, rotations, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.cuda.device_of(hidden):
            output, hidden_rows = self.model.output, hidden.reshape(-1, hidden.shape[-1])
            y = matmul(hidden_rows, held(output), dtype=torch.float32)
            if output.low_rank is not None:
                output.low_rank.add_to(y, hidden_rows)
        return y.view(*hidden.shape[:-1], -1)

    def token_sampler(self) -> TokenSampler:
        return CudaSampler() if self._samples else TorchSampler()

    @property
    def _samples(self) -> bool:
        return self.model.args.vocab_size <= LARGEST_VOCAB


class CudaSampler:
    """Draws tokens by kernels that let nobody wait, so that a captured step serves all parameters of its kinds."""

    def __call__(self, logits: Tensor, uniform: Tensor, rows: SamplingTensors) -> Tensor:
        with torch.cuda.device_of(logits):
            return rows.choose(
                lambda: sampling.greedy(logits),
                lambda: sampling.sample_all(logits, rows.temperature, uniform),
                lambda: sampling.sample_nucleus(logits, rows.temperature, rows.top_p, uniform),
            )

    def filter(
        self, logits: Tensor, filters: FilterTensors, temperature: Tensor, xtc_uniform: Tensor | None = None
    ) -> Tensor:
        """See `TokenSampler`."""
        with torch.cuda.device_of(logits):
            return filter_logits(logits, filters, temperature, xtc_uniform)
