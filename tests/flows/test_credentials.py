"""Credentials in addresses: refused before Prefect stores them, and left out of every message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from s3fs import S3FileSystem

from flows.cli import main
from spinreg_core.config import RunConfig
from spinreg_core.config.resolve import validate
from spinreg_core.errors import EXIT_BAD_INPUT, BadInput, Damaged, StoreFailed
from spinreg_core.runtime.failures import describe_error
from spinreg_core.store.retries import RetryTimes
from spinreg_core.store.s3 import S3Store

PLANTED = "planted-address-7Xq"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--store", f"s3://somebody:{PLANTED}@bucket/x"],
        ["--store", f"s3://{PLANTED}@bucket/x"],
        ["--model", f"s3://somebody:{PLANTED}@bucket/x"],
        ["--dataset", f"https://somebody:{PLANTED}@127.0.0.1/x.jsonl"],
        ["-p", f"data.heldout_dataset=s3://somebody:{PLANTED}@bucket/x"],
        ["-p", f'data.mixed_datasets={{"s3://somebody:{PLANTED}@bucket/x": 1}}'],
        ["-p", f'data.evaluation_sets=["s3://somebody:{PLANTED}@bucket/x"]'],
        ["-p", f"generation.engine=http://somebody:{PLANTED}@host:1"],
        ["--dataset", f"s3://bucket/rows.jsonl?X-Amz-Security-Token={PLANTED}"],
        ["--dataset", f"https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Signature={PLANTED}"],
        ["-p", f"judge.base_url=https://127.0.0.1/v1?api-key={PLANTED}"],
        ["--config", f"https://127.0.0.1/x.yaml?X-Amz-Signature={PLANTED}"],
        ["--config", f"s3://somebody:{PLANTED}@bucket/x.yaml"],
        ["--config", f"https://somebody:{PLANTED}@127.0.0.1/x.yaml"],
    ],
)
def test_run_credentials_end_it_before_a_flow_run_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    """Prefect stores the parameters of a flow run, and a flow run would fail here for want of a server."""
    monkeypatch.chdir(tmp_path)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert main(["run", *arguments]) == EXIT_BAD_INPUT
    said = "".join(capsys.readouterr())
    assert "PREFECT_API_URL" not in said
    assert "***" in said
    assert PLANTED not in said


@pytest.mark.parametrize(
    "item",
    [
        f"judge.api_key={PLANTED}",
        f"judge.key_variable={PLANTED}",
        f'judge.key_variable=["{PLANTED}"]',
        f"api_key={PLANTED}",
        f'resources.env={{"AWS_SECRET_ACCESS_KEY": "{PLANTED}"}}',
        f'aws={{"secret": "{PLANTED}"}}',
        f"model.token={PLANTED}",
        f"store.aws_secret_access_key={PLANTED}",
        f"judge.model.key={PLANTED}",
        f"judge={PLANTED}",
    ],
)
def test_run_hides_values_of_unknown_fields(capsys: pytest.CaptureFixture[str], item: str) -> None:
    assert main(["run", "-p", item]) == EXIT_BAD_INPUT
    said = "".join(capsys.readouterr())
    assert re.split("[.=]", item)[0] in said
    assert PLANTED not in said


def test_store_check_hides_credentials_of_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries may quote an address that they cannot reach."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://somebody:{PLANTED}@127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-key-7Xq")
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(BadInput, match="cannot be used") as caught:
            S3Store("s3://bucket/x", RetryTimes(check=0.5)).check()
    finally:
        S3FileSystem.clear_instance_cache()
    assert "7Xq" not in str(caught.value)


@pytest.mark.parametrize("kind", [BadInput.from_message, Damaged, StoreFailed, RuntimeError])
def test_describe_error_hides_credentials(kind: type[Exception]) -> None:
    text = f"http://somebody:{PLANTED}@host:9000/bucket, and postgresql://{PLANTED}@host"
    assert describe_error(kind(text), "train", RunConfig())[1].endswith(
        "http://***@host:9000/bucket, and postgresql://***@host"
    )


@pytest.mark.parametrize("text", ["s3://bucket/a: found x@y; expected z", "see https://host/a/b, or mail a@b"])
def test_message_without_credentials_stays_unchanged(text: str) -> None:
    assert str(Damaged(text)) == text


def test_validate_accepts_patterns_that_look_like_credentials() -> None:
    assert validate({"data": {"drop_patterns": ["https?://[^ ]+:x@"]}}).data.drop_patterns == ["https?://[^ ]+:x@"]


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://h/x?a=1&X-Amz-Signature={PLANTED} failed",
        f"cannot read s3://h/x?AWSAccessKeyId=a&token={PLANTED}",
        f"https://h/v1?api-key={PLANTED}: 401",
        f"found 'https://h/x?sig={PLANTED}'",
        f"proxy http://somebody:{PLANTED}@h:1 refused",
    ],
)
def test_messages_hide_signatures_and_keys(text: str) -> None:
    said = str(StoreFailed(text))
    assert PLANTED not in said
    assert "***" in said
    assert str(StoreFailed("s3://bucket/a?b=c&d=e")) == "s3://bucket/a?b=c&d=e"
