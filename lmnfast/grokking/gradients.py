"""The training loss and its gradients, without autograd. They are cheap because a pair of tokens has two halves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from .model import EMBEDDING

aten = torch.ops.aten
# For each activation: out = a(z), and out = gradient times a'(z). out may share its memory with gradient or z.
FORWARD = {
    nn.SiLU: lambda z, out: aten.silu.out(z, out=out),
    nn.ReLU: lambda z, out: torch.clamp_min(z, 0, out=out),
}
BACKWARD = {
    nn.SiLU: lambda gradient, z, out: aten.silu_backward.grad_input(gradient, z, grad_input=out),
    nn.ReLU: lambda gradient, z, out: aten.threshold_backward.grad_input(gradient, z, 0, grad_input=out),
}


class Gradients:
    """A function without arguments that sets the ``grad`` of every parameter: the gradient of the mean cross-entropy over all
    samples, or over those that `choose` was last called with.

    The result equals autograd's to rounding. The first Linear works on tokens, not on pairs of tokens: a sample's
    pre-activation is the sum of one row for its first token and one row for its second token. All memory is allocated once and
    used again at each call. On one core, with 768 samples, six tenths of the time go to matrix products, at PyTorch's rate for
    their size. On the CPU stacking several networks is not faster: a batched product takes 176 us per seed, a single product
    177 us.

    Args:
        model: as make_model returns it, of any floating dtype and on any device. Its parameters must keep their tensors. Or
            several networks as `stacked_model` returns them. All then take one step together, each on its own samples.
        inputs: (samples, 2) int64, without equal pairs; (networks, samples, 2) for several networks.
        labels: (samples,) int64; (networks, samples).
        loss_dtype: what the softmax of the loss, and its difference from the labels, are computed in. That difference is then
            rounded to the model's dtype, in which everything else is computed.
        batch: the number of samples in a batch; None: all samples. A batch has the cost of all pairs of tokens in the first
            Linear. Only for one network.
    """

    def __init__(
        self,
        model: nn.Sequential,
        inputs: Tensor,
        labels: Tensor,
        *,
        loss_dtype: torch.dtype = torch.float64,
        batch: int | None = None,
    ) -> None:
        gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.embedding, w_1, self.b_1, *later = (p.detach() for p in model.parameters())
        self.d_embedding, d_w_1, self.d_b_1, *d_later = gradients
        self.first, self.second = w_1[..., :EMBEDDING], w_1[..., EMBEDDING:]
        self.d_first, self.d_second = d_w_1[..., :EMBEDDING], d_w_1[..., EMBEDDING:]
        *self.hidden, (self.w, b) = zip(later[::2], later[1::2], strict=True)
        *self.d_hidden, (self.d_w, self.d_b) = zip(d_later[::2], d_later[1::2], strict=True)
        self.b = b[..., None]
        kind = type(model.get_submodule("hidden_1"))
        self.activation, self.activation_backward = FORWARD[kind], BACKWARD[kind]
        self.mm: Callable[..., Tensor] = torch.mm
        self.addmm: Callable[..., Tensor] = torch.addmm
        networks, stack = 1, inputs.shape[:-2]
        if stack:
            networks, self.mm, self.addmm = len(inputs), torch.bmm, torch.baddbmm
            self.b_1, self.hidden = self.b_1[:, None], [(w, b[:, None]) for w, b in self.hidden]

        tokens, width, new = self.embedding.shape[-2], w_1.shape[-2], self.embedding.new_empty
        # (samples,), places in the square of all pairs of tokens; of several networks in their squares one after the other
        begins = torch.arange(networks, device=inputs.device).view(*stack, -1) * tokens**2
        self.all_cells = self.cells = (inputs[..., 0] * tokens + inputs[..., 1] + begins).flatten()
        targets = -one_hot(labels, tokens).mT.to(loss_dtype).contiguous()
        self.all_minus_targets = self.minus_targets = targets
        if batch is not None:
            self.cells = self.cells[:batch].clone()
            self.minus_targets = self.minus_targets[:, :batch].clone(memory_format=torch.contiguous_format)
        self.samples = len(self.cells) // networks
        self.rows_of_samples = torch.arange(len(self.cells), device=inputs.device)
        self.samples_of_cells = self.cells.new_empty(networks * tokens**2)
        self._place()
        self.square = new(*stack, tokens, tokens, width)
        self.rows = self.square.view(-1, width)
        self.padded = new(
            len(self.cells) + 1, width
        ).zero_()  # the last row is 0, for pairs that are not samples
        self.first_z = self.padded[:-1]
        # The pre-activations and activations of each hidden layer.
        shape = *stack, self.samples, width
        self.z = [self.first_z.view(shape), *(new(shape) for _ in self.hidden)]
        self.a = [new(shape) for _ in self.z]
        # Transposed: the narrow product then takes half the time.
        self.logits = new(*stack, tokens, self.samples)
        wide = loss_dtype != self.logits.dtype
        self.wide = torch.empty_like(self.logits, dtype=loss_dtype) if wide else None

    def choose(self, chosen: Tensor) -> None:
        """Sets the samples of the batch. chosen: (batch,) int64, their numbers, each at most once."""
        torch.index_select(self.all_cells, 0, chosen, out=self.cells)
        torch.index_select(self.all_minus_targets, 1, chosen, out=self.minus_targets)
        self._place()

    def _place(self) -> None:
        self.samples_of_cells.fill_(len(self.cells))
        self.samples_of_cells[self.cells] = self.rows_of_samples

    def _difference(self) -> Tensor:
        """The softmax of the logits minus the labels, (..., tokens, samples), in the dtype of the logits."""
        if self.wide is None:
            return torch.softmax(self.logits, -2).add_(self.minus_targets)
        e = self.wide.copy_(self.logits)  # torch.softmax in float64 takes twice as long as these lines
        e.sub_(e.amax(-2, keepdim=True)).exp_()
        torch.addcmul(self.minus_targets, e, e.sum(-2, keepdim=True).reciprocal_(), out=e)
        return self.logits.copy_(e)

    @torch.no_grad()
    def __call__(self) -> None:
        by_first = self.mm(self.embedding, self.first.mT)
        by_second = self.addmm(self.b_1, self.embedding, self.second.mT)
        torch.add(by_first.unsqueeze(-2), by_second.unsqueeze(-3), out=self.square)
        torch.index_select(self.rows, 0, self.cells, out=self.first_z)
        self.activation(self.z[0], self.a[0])
        for n, (w, b) in enumerate(self.hidden, 1):
            self.addmm(b, self.a[n - 1], w.mT, out=self.z[n])
            self.activation(self.z[n], self.a[n])
        self.addmm(self.b, self.w, self.a[-1].mT, out=self.logits)

        # From here on the buffers hold gradients.
        d = self._difference().div_(self.samples)
        self.mm(d, self.a[-1], out=self.d_w)
        torch.sum(d, -1, out=self.d_b)
        self.mm(d.mT, self.w, out=self.a[-1])
        for n in range(len(self.hidden), 0, -1):
            d_w, d_b = self.d_hidden[n - 1]
            self.activation_backward(self.a[n], self.z[n], self.z[n])
            self.mm(self.z[n].mT, self.a[n - 1], out=d_w)
            torch.sum(self.z[n], -2, out=d_b)
            self.mm(self.z[n], self.hidden[n - 1][0], out=self.a[n - 1])
        self.activation_backward(self.a[0], self.z[0], self.z[0])
        torch.index_select(self.padded, 0, self.samples_of_cells, out=self.rows)
        by_first, by_second = self.square.sum(-2), self.square.sum(-3)
        torch.sum(by_second, -2, out=self.d_b_1)
        self.mm(by_first.mT, self.embedding, out=self.d_first)
        self.mm(by_second.mT, self.embedding, out=self.d_second)
        self.addmm(by_first @ self.first, by_second, self.second, out=self.d_embedding)


def lost_gradients(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of samples whose loss has a true-class gradient that the round-off of a dtype can turn into 0.

    The gradient of a sample's loss with respect to the logit of its label y is p_y - 1 = -s / (1 + s), where p is the softmax
    and s the sum over k != y of e_k = exp(z_k - z_y). The softmax divides by 1 + s. If e_k is at most half an ulp of 1, epsilon
    / 2 (2^-24 in float32, 2^-53 in float64), then 1 + e_k is 1 in floating point (the tie goes to the even neighbour, 1). If
    all e_k are, then a sum that begins with the label's 1 is 1 to its end, p_y is exactly 1 and the label's gradient exactly 0.
    Those of the other classes are not 0: a sample's gradients no longer sum to 0, and its other logits only sink. These samples
    are counted.

    The count depends on no order of summation. A sum in another order, as of torch.softmax, keeps some of these samples, and
    never loses others, because a partial sum that holds e_k is at least e_k. So the count is an upper bound, and warns early:
    in a run on XOR with the loss in float32 it is 1 at step 11 000, softmax has the first p_y = 1 at 12 000, L2 norm and LMN
    leave the curves of the loss in float64 visibly at 14 000. The condition s <= epsilon / 2, for which every order loses the
    gradient, first counts a sample after that.

    Args:
        logits: (samples, classes), of any floating dtype; e is computed in float64.
        labels: (samples,) int64.
        dtype: what the loss is computed in.

    Returns:
        The count, 0-dim int64, on the device of the logits. A sample with NaN among its logits does not count.

    Source: arXiv 2605.06152, on the instability that follows.
    """
    z = logits.double()
    e = z.sub(z.gather(1, labels[:, None])).exp_()
    largest = e.scatter(1, labels[:, None], 0).amax(1)
    return (largest <= torch.finfo(dtype).eps / 2).sum()
