# MLflow server and optuna-dashboard in one slim image: no torch, no Ray, no CUDA, no Caddie.
#
#   docker build -f deploy/docker/servers.Dockerfile -t caddie-servers:0.1.0 .
#
# Build it in the repository's root. Which of the two runs is said by the command.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS packages
ARG PIP_OPTIONS=
COPY constraints.txt deploy/docker/servers.txt /build/
RUN python -m venv /opt/servers \
 && /opt/servers/bin/pip install --no-cache-dir ${PIP_OPTIONS} \
      -c /build/constraints.txt -r /build/servers.txt \
 && /opt/servers/bin/pip check

FROM ${BASE}
ARG UID=1000
RUN useradd --uid ${UID} --no-create-home --home-dir /tmp --shell /usr/sbin/nologin caddie \
 && install --directory --owner caddie /mlartifacts
COPY --from=packages /opt/servers /opt/servers
ENV PATH=/opt/servers/bin:$PATH \
    HOME=/tmp \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER caddie
CMD ["mlflow", "--version"]
