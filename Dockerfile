# The page, and training, on a CPU:
#
#     docker build -t sifar .
#     docker run -p 7860:7860 sifar                                 # the page of the shipped model
#     docker run --user "$(id -u)" -v "$PWD:/work" sifar sifar-train --dataset digits
#
# Without CUDA it is 4 GB smaller: --build-arg TORCH_INDEX=..., PyTorch's CPU index, see its start page.
FROM python:3.12-slim

ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.6,<3" "torchvision>=0.21,<1"
# large and seldom new, so before sifar itself
COPY requirements.txt /build/
RUN pip install --no-cache-dir -r /build/requirements.txt

COPY pyproject.toml README.md LICENSE train.py export.py app.py /build/
COPY sifar /build/sifar
COPY examples /build/examples
COPY results/cifar100-resnet18 /build/results/cifar100-resnet18
RUN pip install --no-cache-dir --no-deps /build && rm -r /build \
    && sifar-export "$(python -c 'from sifar.files import ROOT; print(ROOT)')/results/cifar100-resnet18"

# runs/ and data/ come here: a folder of the host, or a volume
WORKDIR /work
RUN useradd sifar && chown sifar /work
USER sifar
# libraries keep their caches below it, whoever the user is
ENV HOME=/tmp GRADIO_SERVER_NAME=0.0.0.0
EXPOSE 7860
HEALTHCHECK --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860', timeout=5)"]
CMD ["sifar-app"]
