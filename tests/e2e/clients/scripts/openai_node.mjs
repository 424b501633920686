// The official openai SDK for Node. Prints one JSON object of what it saw.
import OpenAI from "openai";

const { BASE_URL, KEY, MODEL, EMBEDDER } = process.env;
const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France? Answer in one word." }];
const parameters = { type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false };
const seen = {};

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);
seen.chat = (await client.chat.completions.create({ model: MODEL, messages, temperature: 0, max_tokens: 16 })).choices[0].message.content;
seen.stream = "";
for await (const chunk of await client.chat.completions.create({ model: MODEL, messages, temperature: 0, max_tokens: 16, stream: true })) {
  seen.stream += chunk.choices[0]?.delta?.content ?? "";
}
const helper = client.chat.completions.stream({ model: MODEL, messages, temperature: 0, max_tokens: 16 });
seen.helper = await helper.finalContent();
const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];
const called = client.chat.completions.stream({ model: MODEL, messages, tools, tool_choice: "required", parallel_tool_calls: false, temperature: 0, max_tokens: 64 });
const call = (await called.finalChatCompletion()).choices[0].message.tool_calls[0];
seen.tool = { name: call.function.name, arguments: JSON.parse(call.function.arguments) };
const response_format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: parameters } };
const shaped = await client.chat.completions.parse({ model: MODEL, messages, response_format, temperature: 0, max_tokens: 64 });
seen.json = JSON.parse(shaped.choices[0].message.content);
seen.width = (await client.embeddings.create({ model: EMBEDDER, input: "a cat" })).data[0].embedding.length;
const events = client.responses.stream({ model: MODEL, input: "What is the capital of France?", max_output_tokens: 32, temperature: 0 });
seen.kinds = [];
for await (const event of events) seen.kinds.push(event.type);
seen.response = (await events.finalResponse()).output_text;
seen.errors = {};
for (const [name, attempt] of Object.entries({
  model: () => client.chat.completions.create({ model: "none", messages }),
  key: () => new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: "wrong", maxRetries: 0 }).models.list(),
})) {
  try { await attempt(); } catch (error) { seen.errors[name] = [error.constructor.name, error.code]; }
}
// Leaving the loop aborts the request; the server has to notice, or it would go on for thousands of tokens.
const running = async () => {
  const text = await (await fetch(`${BASE_URL}/metrics`, { headers: { authorization: `Bearer ${KEY}` } })).text();
  return text.split("\n").filter((line) => line.startsWith("braid:num_requests_running{")).reduce((sum, line) => sum + Number(line.split(" ").pop()), 0);
};
const stopped = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 8000, ignore_eos: true, stream: true });
seen.aborted = [];
for await (const chunk of stopped) {
  if (!chunk.choices[0]?.delta?.content) continue;
  seen.aborted.push(await running());
  break;
}
for (let tries = 0; tries < 40 && (await running()) > 0; tries++) await new Promise((resolve) => setTimeout(resolve, 50));
seen.aborted.push(await running());
console.log(JSON.stringify(seen));
