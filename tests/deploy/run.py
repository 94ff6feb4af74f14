"""Deployments on a real Docker engine under load: no failed request, no lost and no doubled job.

Refusals first, with nothing to touch, and a newcomer's first minutes. Then, while callers submit, poll and send slow requests
and jobs run: three deploys, a release that does not start, a rollback, deploy.sh killed with -9 at five moments, a worker
killed, Redis lost, a backup restored, bad input. In the end every accepted job must have been delivered, once. The control,
`docker compose up -d --force-recreate` under the same load, must fail requests, or this program could not see any. Last, the
guide's disasters: the ledger's tables lost, the host lost.

  python tests/deploy/run.py                 writes deploy.json; exit status 0 only if all of it held
  python tests/deploy/run.py --keep          leaves the site up
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sqlalchemy import Engine, make_url

from deploy.bad_input import refuse_at_first
from deploy.contained import check_containers, check_image
from deploy.load import Load
from deploy.newcomer import deliver_first_jobs
from deploy.outcome import SKU, SPARE_JOB, await_jobs, check_folders, check_guide, lose_host, lose_tables
from deploy.phases import Phases
from deploy.report import Failed, Report, say
from deploy.site import Site, make_site
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.product import Product, make_product
from ncr_upload.entrypoints.embedded.samples import put_objects
from ncr_upload.entrypoints.embedded.studio import Listed, add_job

JOBS = 400
CONTROL = "control: up --force-recreate"


def place_jobs(site: Site, engine: Engine, product: Product) -> list[str]:
    """Many jobs that one product is listed for."""
    bucket = {"access_key": site.settings["WASABI_ACCESS_KEY"], "secret_key": site.settings["WASABI_SECRET_KEY"]}
    put_objects({"endpoint": f"http://{site.address('s3')}:9000", "bucket": "studio", **bucket}, product.files)
    listed = [Listed(key, datetime(2026, 11, 1, 10, tzinfo=UTC).replace(tzinfo=None)) for key in product.files]
    job_ids = [f"load-{number:04}" for number in range(JOBS)]
    for job_id in job_ids:
        add_job(engine, job_id, SKU, listed, campaign="deploy")
    add_job(engine, SPARE_JOB, SKU, listed, campaign="spare")
    return job_ids[::-1]


def open_database(site: Site) -> Engine:
    url = make_url(site.settings["DATABASE_URL"]).set(host=site.address("database"))
    return open_engine(url.render_as_string(hide_password=False), pool_size=2)


def play(site: Site, report: Report) -> None:
    report.timed("refusals", lambda: refuse_at_first(site, report))
    report.timed("build", lambda: site.compose("build", "--quiet", "web", "s3", "database"))
    report.timed("newcomer", lambda: deliver_first_jobs(site))
    report.timed("containers", lambda: check_containers(site, report))
    check_image(site, report, f"{site.settings['NCR_IMAGE']}:dev")
    engine = open_database(site)
    product = make_product("load", SKU, seed=7)
    load = Load(int(site.settings["API_PORT"]), site.settings["API_KEY"], place_jobs(site, engine, product))
    load.start()
    try:
        phases = Phases(site, load, engine, report)
        phases.run()
        report.facts["failed_requests"] = len(load.failures)
        report.expect(not load.failures, f"{len(load.failures)} requests failed: {load.failures[:3]}")
        phases.phase(CONTROL, lambda: site.compose("up", "-d", "--force-recreate", "--no-deps", "web", "proxy"))
        report.facts["control_failed_requests"] = len(load.failed_in(CONTROL))
        report.expect(bool(load.failed_in(CONTROL)), "the control failed no request: this load would not have seen one")
    finally:
        load.stop()
    report.facts["requests"] = dict(load.requests)
    site.compose("up", "--detach", "--no-deps", "proxy")  # the guide's, for a moment without callers
    report.timed("last_jobs", lambda: await_jobs(engine, load, report))
    check_folders(site, report, len(product.delivered))
    report.timed("tables_lost", lambda: lose_tables(site, engine))
    report.timed("host_lost", lambda: lose_host(site))
    check_guide(site, report)
    engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("deploy.json"))
    parser.add_argument("--keep", action="store_true", help="leave the site up")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop before it was done"))
    report, began = Report(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="ncr-deploy-"))
    log = arguments.json.absolute().with_suffix(".log")
    log.unlink(missing_ok=True)
    site = make_site(folder / "ncr", log)
    try:
        play(site, report)
    except (Failed, SystemExit) as failed:
        report.expect(False, str(failed))
    finally:
        if not arguments.keep:
            site.remove()
            folder.rmdir()
    result = {
        "ok": not report.wrong,
        "wrong": report.wrong,
        "took_seconds": round(time.monotonic() - began),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        **report.facts,
        "phases": report.phases,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    outcome = "everything held" if not report.wrong else "NOT everything held"
    say(f"{outcome}: {arguments.json}, {result['took_seconds']} s; every command is in {log}")
    return 0 if not report.wrong else 1


if __name__ == "__main__":
    raise SystemExit(main())
