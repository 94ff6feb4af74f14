"""What a container may do and reach, seen from inside it and in how the engine runs it."""

from __future__ import annotations

from typing import Any

from deploy.report import Report
from deploy.site import Site

OURS = ("web", "worker", "beat", "flower")
NETWORKS = {
    "proxy": {"edge"},
    "web": {"edge", "inner"},
    "worker": {"inner"},
    "beat": {"inner"},
    "flower": {"inner"},
    "redis": {"inner"},
}
PUBLISHED = {"proxy": {"8001/tcp"}, "flower": {"5555/tcp"}, "redis": {"6380/tcp"}}
COMPILERS = "cc gcc g++ c++ clang tcc ld as make cargo go"
SECRETS = (
    "API_KEY",
    "REDIS_PASSWORD",
    "WASABI_SECRET_KEY",
    "SFTP_PASSWORD",
    "VALIDATOR_API_KEY",
    "EMBEDDED_DATABASE_PASSWORD",
    "EMBEDDED_SFTP_HOST_KEY",
)


def check_containers(site: Site, report: Report) -> None:
    for service, networks in NETWORKS.items():
        for container in site.containers(service):
            facts = site.inspect(container)
            _check_limits(service, facts, report)
            on = {name.removeprefix(f"{site.project}_") for name in facts["NetworkSettings"]["Networks"]}
            report.expect(on == networks, f"{service} is on {on}, not {networks}")
            _check_published(service, facts, report)
            if service in OURS:
                _check_rights(service, facts, report)
    inside = site.compose(
        "exec", "-T", "web", "sh", "-c", "id -u; touch /opt/ncr/x /etc/x; touch /tmp/x && echo writes", expect=None
    )
    report.expect(inside.stdout.split() == ["10001", "writes"], f"in web: {inside.stdout!r}")
    report.expect(inside.stderr.count("Read-only file system") == 2, f"the root file system: {inside.stderr!r}")
    reach = [
        site.compose("exec", "-T", each, "getent", "hosts", "redis", expect=None).returncode == 0 for each in ("web", "proxy")
    ]
    report.expect(reach == [True, False], f"redis is known to web and not to the proxy: {reach}")
    _check_stop_times(site, report)


def _check_limits(service: str, facts: dict[str, Any], report: Report) -> None:
    host = facts["HostConfig"]
    report.expect(host["Memory"] > 0 and host["NanoCpus"] > 0, f"{service} has no limit of memory or CPU")
    report.expect(bool(facts["Config"].get("Healthcheck", {}).get("Test")), f"{service} has no health check")
    report.expect("no-new-privileges:true" in host["SecurityOpt"], f"{service} may gain privileges")


def _check_rights(service: str, facts: dict[str, Any], report: Report) -> None:
    host = facts["HostConfig"]
    report.expect(host["ReadonlyRootfs"], f"{service} may write to its root file system")
    report.expect(host["CapDrop"] == ["ALL"] and not host["CapAdd"], f"{service} keeps capabilities")
    report.expect(facts["Config"]["User"] == "ncr", f"{service} runs as {facts['Config']['User']}")


def _check_published(service: str, facts: dict[str, Any], report: Report) -> None:
    bound = {port: at for port, at in facts["NetworkSettings"]["Ports"].items() if at}
    report.expect(bound.keys() == PUBLISHED.get(service, set()), f"{service} publishes {bound}")
    if service == "redis":
        report.expect({each["HostIp"] for each in bound["6380/tcp"]} == {"127.0.0.1"}, f"redis is published on {bound}")


def _check_stop_times(site: Site, report: Report) -> None:
    """Longer than the longest stage, and than what each does once it is told to stop."""
    at_least = {"worker": 300, "web": int(site.settings["NCR_DRAIN_SECONDS"]) + 10, "proxy": 60}
    for service, seconds in at_least.items():
        given = site.inspect(site.containers(service)[0])["Config"].get("StopTimeout") or 10
        report.expect(given > seconds, f"{service} is killed after {given} s, and may need {seconds}")


def check_image(site: Site, report: Report, image: str) -> None:
    report.facts["image_mb"] = round(int(site.run("docker", "image", "inspect", "-f", "{{.Size}}", image).stdout) / 1e6)
    history = site.run("docker", "history", "--no-trunc", image).stdout + site.run("docker", "image", "inspect", image).stdout
    held = [name for name in SECRETS if site.settings[name] in history]
    words = " ".join(f"-e '{site.settings[name]}'" for name in SECRETS)
    look = (
        f"for each in {COMPILERS}; do command -v $each; done; "
        "ls -d /etc/pip.conf /root/.npmrc /root/.cache/pip /build /opt/ncr/.env 2>/dev/null; "
        f"grep -rlsF {words} /opt /etc /root /home /var /usr/local"
    )
    found = site.run("docker", "run", "--rm", "--network=none", "--user=0", "--entrypoint=sh", image, "-c", look, expect=None)
    report.expect(not held and not found.stdout, f"the image holds {held} {found.stdout.split()}")
