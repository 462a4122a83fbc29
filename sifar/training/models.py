"""ResNets and a SprintNet for small images, by name, and timm's models fitted to small images.

Shapes: images are (n,3,h,w), features (n,c,h,w), logits (n,n_out)."""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from fastcore.all import L
from torch import nn

from ..config import ARCHS, nearest
from ..errors import UserError, one_line

# channels of each stage, blocks of each stage, whether the head is late
WIDTHS: dict[str, tuple] = {
    "resnet8": ((16, 32, 64), (1, 1, 1)),
    "resnet10": ((64, 128, 256, 512), (1, 1, 1, 1)),
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet18-late": ((64, 128, 256, 512), (2, 2, 2, 2), True),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3)),
}


def conv3x3(ni, nf, stride=1):
    "(n,ni,h,w) -> (n,nf,h/stride,w/stride), without a bias: a BatchNorm follows, which has one."
    return nn.Conv2d(ni, nf, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (n,ni,h,w) -> (n,nf,h/stride,w/stride).

    Where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, ni, nf, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(ni, nf, stride), nn.BatchNorm2d(nf)
        self.conv2, self.bn2 = conv3x3(nf, nf), nn.BatchNorm2d(nf)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if ni != nf or stride != 1:
            conv = nn.Conv2d(ni, nf, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(nf))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of basic blocks with a 3x3 stem and no max-pool: (n,3,h,w) -> (n,n_out).

    At 32x32 pixels the stages work at 32, 16, 8 and 4. https://arxiv.org/abs/1512.03385
    zero_init: each block starts as its shortcut. https://arxiv.org/abs/1706.02677
    late: the head sees the quarters of what the last two stages make, not the mean of the last alone: of a
    model that has learned other classes, more is of use there."""

    def __init__(self, widths, depths, late=False, *, n_out, zero_init=True):
        super().__init__()
        ni = widths[0]
        self.stem = nn.Sequential(conv3x3(3, ni), nn.BatchNorm2d(ni), nn.ReLU(inplace=True))
        blocks, self.stage_of = [], []
        for stage, (nf, depth) in enumerate(zip(widths, depths)):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1   # each stage but the first halves the side
                blocks.append(BasicBlock(ni, nf, stride))
                self.stage_of.append(stage)
                ni = nf
        self.blocks, self.last = nn.Sequential(*blocks), len(blocks) - depths[-1] if late else None
        self.num_features, side = ni, 1
        if late: self.num_features, side = ni + widths[-2], 2
        linear = nn.Linear(self.num_features * side**2, n_out)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), linear)
        self.init_weights(zero_init)

    def init_weights(self, zero_init):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, BasicBlock) and zero_init:
                nn.init.zeros_(m.bn2.weight)        # the scale of what is added to the shortcut

    # these four as in timm's models
    def forward_features(self, x):
        "(n,3,h,w) -> (n,num_features,h/8,w/8) of 4 stages; h/4 and w/4 where the head sees the last two."
        if self.last is None: return self.blocks(self.stem(x))
        x = self.blocks[:self.last](self.stem(x))
        return torch.cat((F.interpolate(self.blocks[self.last:](x), x.shape[2:]), x), 1)

    # -> (n,n_out); of the quarters of two stages the squares sum up to some nine times as much as of one mean
    def forward_head(self, x): return self.head(x if self.last is None else x / 3)
    def get_classifier(self): return self.head[-1]

    def group_matcher(self, coarse=False):
        "The stage of a parameter by its name; the stem belongs to the first."
        def stage(name):
            part, i, *_ = name.split(".")
            if part == "head": return len(self.stage_of)
            return self.stage_of[int(i)] if part == "blocks" else 0
        return stage

    def forward(self, x): return self.forward_head(self.forward_features(x))


class Whitening(nn.Module):
    """The principal components of patches of 2x2 pixels, with equal variance, and their negatives.

    (n,3,h,w) -> (n,24,h-1,w-1). The filters are computed from images once and stay as they are;
    only a bias is trained. https://arxiv.org/abs/2404.00498"""
    filters: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("filters", torch.randn(24, 3, 2, 2))
        self.bias = nn.Parameter(torch.zeros(24))

    def fit(self, x, eps=5e-4):
        "Compute the filters from images x (n,3,h,w), normalised; no variance counts as below `eps`."
        patches = F.unfold(x.float(), 2)    # (n,12,p): 3 * 2 * 2 values of p patches
        patches = patches.transpose(1, 2).reshape(-1, 12)           # (n*p,12)
        covariance = patches.T @ patches / len(patches)  # (12,12), as normalised images have mean 0
        variances, directions = torch.linalg.eigh(covariance)       # a direction a column
        filters = (directions / (variances + eps).sqrt()).T.reshape(12, 3, 2, 2)
        # both signs, as the GELU behind cuts one off
        self.filters.copy_(torch.cat((filters, -filters)))

    def forward(self, x): return F.conv2d(x, self.filters, self.bias)


class EvenConv(nn.Conv2d):
    """A 3x3 convolution before a pool: a CPU leaves out the last row and column of odd sides, as that would.

    (n,ni,h,w) -> (n,nf,h,w), or on a CPU where both sides are odd (n,nf,h-1,w-1)."""

    def __init__(self, ni, nf): super().__init__(ni, nf, 3, padding=1, bias=False)

    def forward(self, x):
        odd = all(side % 2 for side in x.shape[2:])
        # a GPU takes longer to copy x with its border than to compute the row and column
        if x.device.type != "cpu" or not odd: return super().forward(x)
        x = F.pad(x, (1, 0, 1, 0))
        # all by position, as nn.Conv2d calls it: see SmallConvs
        return F.conv2d(x, self.weight, None, self.stride, (0, 0), self.dilation, self.groups)


class SprintBlock(nn.Module):
    """Three 3x3 convolutions, half the side after the first, the others with a shortcut around them.

    (n,ni,h,w) -> (n,nf,h//2,w//2)."""

    def __init__(self, ni, nf):
        super().__init__()
        self.conv1, self.bn1 = EvenConv(ni, nf), quick_norm(nf)
        self.conv2, self.bn2 = conv3x3(nf, nf), quick_norm(nf)
        self.conv3, self.bn3 = conv3x3(nf, nf), quick_norm(nf)
        self.pool, self.act = nn.MaxPool2d(2), nn.GELU()
        # the first filters copy their channel, so that features get through from the start
        for conv in (self.conv1, self.conv2, self.conv3): nn.init.dirac_(conv.weight[:conv.in_channels])

    def forward(self, x):
        x = self.act(self.bn1(self.pool(self.conv1(x))))        # (n,ni,h,w) -> (n,nf,h//2,w//2)
        y = self.act(self.bn2(self.conv2(x)))
        return self.act(self.bn3(self.conv3(y)) + x)


def quick_norm(nf):
    "BatchNorm of `nf` channels whose statistics follow a short training."
    return nn.BatchNorm2d(nf, momentum=0.4)


class SprintNet(nn.Module):
    """A network for trainings of minutes: whitened pixels, three SprintBlocks, a linear head.

    (n,3,h,w) -> (n,n_out). Made after those that are trained on CIFAR-10 in seconds, wider for
    more classes. https://arxiv.org/abs/2404.00498"""

    def __init__(self, n_out, widths=(64, 256, 512)):
        super().__init__()
        self.whitening = Whitening()
        inputs = 24, *widths                    # zip drops the last
        self.blocks = nn.Sequential(*(SprintBlock(ni, nf) for ni, nf in zip(inputs, widths)))
        self.num_features = widths[-1]
        self.head = nn.Linear(self.num_features, n_out, bias=False)

    # 32x32 pixels: whitened 24 x 31x31, then 64 x 15x15, 256 x 7x7, 512 x 3x3
    def forward_features(self, x): return self.blocks(F.gelu(self.whitening(x)))
    def forward_head(self, x):
        # (n,h*w,c), as channels_last is in memory: so are the gradients then, and what goes before is faster
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        # the largest of a feature is far from 0, and the loss wants small outputs at first
        return self.head(x.amax(1) + x.mean(1)) / 9

    def get_classifier(self): return self.head
    def group_matcher(self, coarse=False): return {"stem": r"whitening", "blocks": r"blocks\.(\d+)"}

    def forward(self, x): return self.forward_head(self.forward_features(x))


def get_model(arch, n_out, sizes=(32,), zero_init=True):
    """The model `arch` with `n_out` outputs for images of these sizes, pixels.

    `zero_init` is for our ResNets.
    Errors: UserError for an unknown architecture, or one that cannot take the sizes."""
    check_arch(arch)
    if arch.startswith("timm:"): return timm_model(arch.removeprefix("timm:"), n_out, sizes)
    if arch == "sprintnet":
        # 16 -> whitened 15 -> halved three times: 7, 3, 1
        if min(sizes) < 16:
            least = "takes images of 16 pixels or more"
            raise UserError(f"--arch sprintnet {least}, not {min(sizes)}: choose another --arch.")
        return SprintNet(n_out)
    return ResNet(*WIDTHS[arch], n_out=n_out, zero_init=zero_init)


def check_arch(arch):
    "Raise a UserError, with the nearest name, for an architecture that is not there."
    if not arch.startswith("timm:"): return nearest("architecture", arch, ARCHS, "or timm:NAME")
    import timm
    nearest("timm model", arch.removeprefix("timm:"), timm.list_models())


def timm_model(name, n_out, sizes):
    "timm's model `name`, which takes images of these sizes; see shrink_stem."
    import timm
    size = fixed_size(name, sizes)
    with name_sizes(name, sizes): model = timm.create_model(name, num_classes=n_out, **size)
    shrink_stem(model)
    with name_sizes(name, sizes), torch.no_grad():
        model.eval()            # no statistics change
        for sz in set(sizes): model(torch.zeros(2, 3, sz, sz))
    return model


def fixed_size(name, sizes):
    "The argument of timm.create_model for models that are made for one size, as most transformers are."
    import timm
    about = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": sizes[0]} if about and about.fixed_input_size else {}


def stages(model):
    "The trainable parameters of a model, a list for each stage; the last one is the head's alone."
    from timm.models import group_parameters
    # some transformers have two classifiers
    head = {p for m in L(model.get_classifier()) for p in m.parameters()}
    groups = group_parameters(model, model.group_matcher(coarse=True), return_values=True)
    body = [[p for p in ps if p.requires_grad and p not in head] for ps in groups.values()]
    return [*filter(None, body), [p for p in model.parameters() if p in head]]


@contextmanager
def name_sizes(name, sizes):
    "Whatever a model of timm raises here becomes a UserError that names the sizes it was to take."
    try: yield
    # Its thousand models fail at odd sizes in every way: RuntimeError, AssertionError, TypeError,
    # ZeroDivisionError ... So no kind is named here, and this is around calls of timm alone.
    except Exception as e:
        pixels = ", ".join(f"{sz}x{sz}" for sz in sorted(set(sizes)))
        why = one_line(e, 120)
        what = f"timm:{name} cannot take images of {pixels} pixels ({why})"
        raise UserError(f"{what}: choose another --arch.") from e


def shrink_stem(model):
    """Let a model look at small images at full size, in place.

    A first convolution of 7x7 with stride 2 becomes one of 3x3 with stride 1, and the first
    max-pool nothing."""
    path, stem = first_module(model, nn.Conv2d)
    if stem is None or (stem.kernel_size, stem.stride) != ((7, 7), (2, 2)): return
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, 1, 1, bias=stem.bias is not None)
    model.set_submodule(path, conv)
    path, pool = first_module(model, nn.MaxPool2d)
    if pool: model.set_submodule(path, nn.Identity())


def first_module(model, kind):
    "Path and module of the first in `model` of this kind, or None and None."
    for path, m in model.named_modules():
        if isinstance(m, kind): return path, m
    return None, None
