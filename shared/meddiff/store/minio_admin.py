"""A user of MinIO (and its drop-ins) for the service alone: the one thing that is not plain S3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import urllib3
from minio import MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException

from meddiff.settings import Settings
from meddiff.store.objects import StoreRefused, StoreUnavailable
from meddiff.store.retry import RetryPolicy

POLICY = "meddiff"


def policy(bucket: str, readable: Sequence[str] = ()) -> dict[str, Any]:
    """What the service does, in the policy language of S3: objects of its bucket read, written, deleted and listed,
    those of the ``readable`` buckets read and listed."""
    others = [
        {
            "Effect": "Allow",
            "Action": ["s3:GetBucketLocation", "s3:ListBucket", "s3:GetObject"],
            "Resource": [place for other in readable for place in (f"arn:aws:s3:::{other}", f"arn:aws:s3:::{other}/*")],
        }
    ]
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
            },
            {
                "Effect": "Allow",
                "Action": [
                    "s3:GetObject",
                    "s3:PutObject",
                    "s3:DeleteObject",
                    "s3:AbortMultipartUpload",
                    "s3:ListMultipartUploadParts",
                ],
                "Resource": [f"arn:aws:s3:::{bucket}/*"],
            },
            *(others if readable else ()),
        ],
    }


def admit(settings: Settings, access_key: str, secret_key: str, readable: Sequence[str] = ()) -> None:
    """The user exists and may do what ``policy`` says to the bucket of ``settings``, whose credentials are the
    administrator's. Raises ``StoreUnavailable`` where MinIO does not answer and ``StoreRefused`` where it refuses or is
    no MinIO."""
    client = MinioAdmin(
        endpoint=settings.s3_endpoint,
        credentials=StaticProvider(
            settings.s3_access_key.get_secret_value(), settings.s3_secret_key.get_secret_value()
        ),
        secure=settings.s3_secure,
        http_client=urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=60), retries=False),
    )

    def made() -> None:
        client.policy_add(POLICY, policy=policy(settings.s3_bucket, readable))
        client.user_add(access_key, secret_key)
        client.policy_set(POLICY, user=access_key)

    try:
        RetryPolicy()(made, lambda error: isinstance(error, urllib3.exceptions.HTTPError))
    except urllib3.exceptions.HTTPError as error:
        raise StoreUnavailable(f"the store does not answer: {type(error).__name__}") from None
    except MinioAdminException as error:
        raise StoreRefused(f"the store makes no user: {error}") from None
