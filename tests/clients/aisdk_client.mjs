// AI SDK: generateText, streamText, objects, tools; over the chat, responses and messages APIs.
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, Output, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const { REAL, ACTED } = process.env;
const MODEL = 'sudoku';
const maxOutputTokens = 300; // held to a form, the model goes on for as long as there is room
const person = z.object({ name: z.string(), age: z.number().int() });
const models = {
  compatible: url => createOpenAICompatible({ name: 'dgemma', baseURL: `${url}/v1`, apiKey: 'none',
    supportsStructuredOutputs: true })(MODEL),
  chat: url => createOpenAI({ baseURL: `${url}/v1`, apiKey: 'none' }).chat(MODEL),
  responses: url => createOpenAI({ baseURL: `${url}/v1`, apiKey: 'none' }).responses(MODEL),
  messages: url => createAnthropic({ baseURL: `${url}/v1`, apiKey: 'none' })(MODEL),
};
const seen = [];
const get_weather = tool({ description: 'The weather', inputSchema: z.object({ city: z.string(), days: z.number().int() }),
  execute: async given => { seen.push(given); return 'rain'; } });
let failures = 0;

async function check(name, work) {
  try {
    await work();
    console.log(`ok\t${name}`);
  } catch (error) {
    failures += 1;
    console.log(`FAIL\t${name}\t${String(error).replace(/\s+/g, ' ').slice(0, 300)}`);
    if (process.env.VERBOSE) console.error(error);
  }
}

function must(truth, what) {
  if (!truth) throw new Error(`not so: ${JSON.stringify(what)}`);
}

for (const [kind, model] of Object.entries(models)) {
  await check(`${kind}: whole and streamed`, async () => {
    must((await generateText({ model: model(ACTED), prompt: 'Hello' })).text.includes('Hello'));
    let text = '';
    for await (const piece of streamText({ model: model(ACTED), prompt: 'Hello' }).textStream) text += piece;
    must(text.includes('Hello'), text);
  });
  await check(`${kind}: Output.object`, async () => {
    const made = await generateText({ model: model(REAL), maxOutputTokens, prompt: 'Who?', output: Output.object({ schema: person }),
      maxRetries: 0 });
    must(person.safeParse(made.output).success, made.output);
  });
  await check(`${kind}: toolChoice required`, async () => {
    const { get_weather: declared } = { get_weather: tool({ ...get_weather, execute: undefined }) };
    const made = await generateText({ model: model(REAL), maxOutputTokens, prompt: 'Hello', tools: { get_weather: declared },
      toolChoice: 'required', maxRetries: 0 });
    must(made.toolCalls.length > 0 && typeof made.toolCalls[0].input.city === 'string', made.toolCalls);
  });
  await check(`${kind}: the loop of a tool`, async () => {
    seen.length = 0;
    const made = await generateText({ model: model(ACTED), prompt: 'What is the weather?', tools: { get_weather },
      stopWhen: stepCountIs(3), maxRetries: 0 });
    must(made.text.includes('rains') && seen[0].city === 'Paris', made.text);
  });
  await check(`${kind}: Output.object beside tools`, async () => {
    const declared = tool({ ...get_weather, execute: undefined });
    const made = await generateText({ model: model(REAL), maxOutputTokens, prompt: 'Who?', tools: { get_weather: declared },
      output: Output.object({ schema: person }), maxRetries: 0 });
    if (made.toolCalls.length) must(typeof made.toolCalls[0].input.city === 'string', made.toolCalls);
    else must(person.safeParse(made.output).success, made.text);
  });
}

// A schema of every kind that zod writes as JSON: taken, and what comes fits where the schema says all of it.
const kinds = {
  string: z.string(), min: z.string().min(2), max: z.string().max(5), length: z.string().length(3),
  regex: z.string().regex(/^[a-c]{2,4}$/), startsWith: z.string().startsWith('ab'), endsWith: z.string().endsWith('yz'),
  includes: z.string().includes('mid'), uppercase: z.string().uppercase(), lowercase: z.string().lowercase(),
  email: z.email(), uuid: z.uuid(), guid: z.guid(), url: z.url(), httpUrl: z.httpUrl(), hostname: z.hostname(),
  emoji: z.emoji(), base64: z.base64(), base64url: z.base64url(), hex: z.hex(), jwt: z.jwt(), nanoid: z.nanoid(),
  cuid: z.cuid(), cuid2: z.cuid2(), ulid: z.ulid(), ipv4: z.ipv4(), ipv6: z.ipv6(), cidrv4: z.cidrv4(),
  cidrv6: z.cidrv6(), e164: z.e164(), date: z.iso.date(), time: z.iso.time(), datetime: z.iso.datetime(),
  duration: z.iso.duration(), number: z.number(), int: z.int(), int32: z.int32(), uint32: z.uint32(),
  float32: z.float32(), float64: z.float64(), gt: z.number().gt(3).lt(9), multipleOf: z.number().multipleOf(5),
  boolean: z.boolean(), nul: z.null(), any: z.any(), unknown: z.unknown(), literal: z.literal(['a', 1, true]),
  enumeration: z.enum(['x', 'y']), nullable: z.string().nullable(), optional: z.string().optional(),
  fallback: z.string().default('a'), readonly: z.array(z.int()).readonly(), array: z.array(z.int()).min(1).max(3),
  tuple: z.tuple([z.string(), z.int()]), rest: z.tuple([z.string()]).rest(z.int()), object: z.object({ a: z.int() }),
  strict: z.strictObject({ a: z.int() }), loose: z.looseObject({ a: z.int() }), catchall: z.object({}).catchall(z.int()),
  record: z.record(z.string(), z.int()), partialRecord: z.partialRecord(z.enum(['a', 'b']), z.int()),
  union: z.union([z.string(), z.int()]), discriminated: z.discriminatedUnion('k', [
    z.object({ k: z.literal('a'), v: z.int() }), z.object({ k: z.literal('b'), w: z.string() })]),
  intersection: z.intersection(z.object({ a: z.int() }), z.object({ b: z.string() })),
  lazy: z.object({ name: z.string(), get children() { return z.array(this).max(2); } }),
  template: z.templateLiteral(['v', z.int(), '.', z.int()]), stringbool: z.codec(z.string(), z.string(), {
    decode: text => text, encode: text => text }), described: z.string().describe('what it is'),
};
await check('zod: every kind of schema', async () => {
  const refused = [];
  for (const [kind, schema] of Object.entries(kinds)) {
    try {
      const made = await generateText({ model: models.compatible(REAL), prompt: 'x', maxOutputTokens: 120, maxRetries: 0,
        output: Output.object({ schema: z.object({ x: schema }) }) });
      if (!made.output) refused.push(kind);
    } catch (error) {
      if (error.statusCode) refused.push(`${kind}: ${error.message}`); // what does not parse ran out of tokens, or
    } // has more rules than JSON's schemas can say
  }
  must(refused.length === 0, refused);
});
process.exit(failures);
