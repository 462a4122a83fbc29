"""ResNets for small images, by name, and timm's models fitted to small images."""
from torch import nn

from .config import ARCHS, nearest
from .errors import UserError, one_line

WIDTHS = {                              # channels of each stage, blocks of each stage
    "resnet8": ((16, 32, 64), (1, 1, 1)),
    "resnet10": ((64, 128, 256, 512), (1, 1, 1, 1)),
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3)),
}


def conv3x3(ni, nf, stride=1): return nn.Conv2d(ni, nf, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    "Two 3x3 convolutions and a shortcut, 1x1 where the shape changes: (n,ni,h,w) -> (n,nf,h/stride,w/stride)."

    def __init__(self, ni, nf, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(ni, nf, stride), nn.BatchNorm2d(nf)
        self.conv2, self.bn2 = conv3x3(nf, nf), nn.BatchNorm2d(nf)
        self.relu = nn.ReLU(inplace=True)
        same = ni == nf and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of basic blocks with a 3x3 stem and no max-pool: (n,3,h,w) -> (n,n_out). https://arxiv.org/abs/1512.03385

    At 32x32 pixels the stages work at 32, 16, 8 and 4. zero_init: each block starts as its shortcut, https://arxiv.org/abs/1706.02677"""

    def __init__(self, widths, depths, n_out, zero_init=True):
        super().__init__()
        ni = widths[0]
        self.stem = nn.Sequential(conv3x3(3, ni), nn.BatchNorm2d(ni), nn.ReLU(inplace=True))
        blocks = []
        for stage, (nf, depth) in enumerate(zip(widths, depths)):
            for i in range(depth):
                blocks.append(BasicBlock(ni, nf, 2 if stage and i == 0 else 1))
                ni = nf
        self.blocks, self.num_features = nn.Sequential(*blocks), ni
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ni, n_out))
        for m in self.modules():
            if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        for m in blocks if zero_init else []: nn.init.zeros_(m.bn2.weight)

    def forward(self, x): return self.forward_head(self.forward_features(x))
    def forward_features(self, x): return self.blocks(self.stem(x))         # these two as in timm's models
    def forward_head(self, x): return self.head(x)


def get_model(arch, n_out, sizes=(32,), zero_init=True):
    "The model `arch` with `n_out` outputs for images of these sizes, pixels; `zero_init` is for our ResNets. Errors: UserError for what it cannot be."
    check_arch(arch)
    if arch.startswith("timm:"): return timm_model(arch.removeprefix("timm:"), n_out, sizes)
    return ResNet(*WIDTHS[arch], n_out, zero_init)


def check_arch(arch):
    "Raise a UserError, with the nearest name, for an architecture that is not there."
    if not arch.startswith("timm:"): return nearest("architecture", arch, ARCHS, "or timm:NAME")
    import timm
    nearest("timm model", arch.removeprefix("timm:"), timm.list_models())


def timm_model(name, n_out, sizes):
    "timm's model `name`; a 7x7 stem and the max-pool behind it become a 3x3 convolution at full size."
    import timm
    import torch
    fixed = timm.get_pretrained_cfg(name, allow_unregistered=True)
    try:
        model = timm.create_model(name, num_classes=n_out, **({"img_size": sizes[0]} if fixed and fixed.fixed_input_size else {}))
        shrink_stem(model)
        with torch.no_grad():
            for sz in set(sizes): model.eval()(torch.zeros(2, 3, sz, sz))
    except Exception as e:
        raise UserError(f"timm:{name} cannot take images of {', '.join(f'{o}x{o}' for o in sorted(set(sizes)))} pixels ({one_line(e, 120)}): choose another --arch.") from e
    return model


def shrink_stem(model):
    "Replace, in place, a first convolution of 7x7 with stride 2 by one of 3x3 with stride 1, and the first max-pool by nothing."
    path, stem = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), (None, None))
    if stem is None or (stem.kernel_size, stem.stride) != ((7, 7), (2, 2)): return
    model.set_submodule(path, nn.Conv2d(stem.in_channels, stem.out_channels, 3, 1, 1, bias=stem.bias is not None))
    pool = next((n for n, m in model.named_modules() if isinstance(m, nn.MaxPool2d)), None)
    if pool: model.set_submodule(pool, nn.Identity())
