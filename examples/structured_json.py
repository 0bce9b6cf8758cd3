"""Output that is JSON of a given schema, whatever the model would have liked to say."""

import argparse
import json

from grokmoe import Client, FinishReason

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--address", default="127.0.0.1:50051", help="where the service is")
address = parser.parse_args().address

SCHEMA = {
    "type": "object",
    "properties": {
        "speaker": {"enum": ["HAMLET", "JULIET", "IAGO"]},
        "mood": {"enum": ["glad", "sad", "angry"]},
        "alive": {"type": "boolean"},
    },
    "required": ["speaker", "mood", "alive"],
    "additionalProperties": False,
}

with Client(address) as client:
    answer = client.generate("Describe a person of the play: ", json_schema=SCHEMA, max_tokens=600, seed=1)
    # With too few tokens it would end in the middle, and say so. Small models like white space between the words.
    assert answer.finish_reason is FinishReason.STOP
    print(json.loads(answer.text))

    print(client.generate("Is it so? Answer: ", choice=["yes", "no", "perhaps"], seed=1).text)
    print(client.generate("In the year ", regex="1[5-6][0-9]{2}", seed=1).text)
