# Two stages. `docker build -t d2m .` makes the slim one that only generates (no torch);
# `docker build --target toolchain -t d2m-toolchain .` makes the one that converts and exports.
#
#   docker run --rm -v "$PWD:/work" d2m run "a red circle" -o out.png
#   docker run --rm -p 127.0.0.1:8000:8000 d2m serve --host 0.0.0.0
#   docker run --rm -v "$PWD:/work" d2m-toolchain convert DENSE -o SPARSE
#
# The container runs as user 1000; add --user "$(id -u):$(id -g)" where /work belongs to another.

FROM python:3.11-slim AS toolchain
# cpu, or a CUDA release such as cu130 (what `uv pip install --torch-backend` takes); empty: the
# build that pip's own indexes have
ARG TORCH_BACKEND=cpu
RUN pip install --no-cache-dir uv && useradd --create-home --uid 1000 d2m
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY d2m d2m
COPY runtime runtime
COPY export export
COPY calib calib
RUN uv pip install --system --no-cache ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} \
    --constraint constraints.txt ".[export,trt-rtx]"
USER d2m
WORKDIR /work
ENTRYPOINT ["d2m"]
CMD ["--help"]

FROM python:3.11-slim AS runtime
RUN useradd --create-home --uid 1000 d2m
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY d2m d2m
COPY runtime runtime
COPY export export
COPY calib calib
# What `d2m serve` needs besides; --build-arg EXTRAS= leaves it out (10 MB).
ARG EXTRAS=[serve]
RUN pip install --no-cache-dir --constraint constraints.txt ".$EXTRAS"
USER d2m
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["d2m"]
CMD ["--help"]
