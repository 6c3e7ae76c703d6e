# biscale-env without an accelerator: simulate, compare, train, report.
#   docker build -t biscale-env .
#   docker run --rm --user "$(id -u)" -v "$PWD/runs:/runs" biscale-env compare --out /runs/first
# It runs as any uid, and the installation may be read-only: compiled kernels and fetched traces
# are kept below /cache, which may be a volume.
FROM python:3.13-slim AS build
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG EXTRAS=rl,render
RUN python -m venv /opt/biscale
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY biscale_env ./biscale_env
COPY controllers ./controllers
COPY agents ./agents
COPY configs ./configs
RUN /opt/biscale/bin/pip install -c constraints.txt ".[${EXTRAS}]"

FROM python:3.13-slim
COPY --from=build /opt/biscale /opt/biscale
ENV PATH=/opt/biscale/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache
RUN mkdir -p /cache /runs && chmod 1777 /cache /runs
USER 10001
WORKDIR /runs
ENTRYPOINT ["biscale"]
CMD ["--help"]
