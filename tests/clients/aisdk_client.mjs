// AI SDK: generateText, streamText, objects, tools; over the chat, responses and messages APIs.
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, Output, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const { REAL, ACTED } = process.env;
const MODEL = 'sudoku';
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
    const made = await generateText({ model: model(REAL), prompt: 'Who?', output: Output.object({ schema: person }),
      maxRetries: 0 });
    must(person.safeParse(made.output).success, made.output);
  });
  await check(`${kind}: toolChoice required`, async () => {
    const { get_weather: declared } = { get_weather: tool({ ...get_weather, execute: undefined }) };
    const made = await generateText({ model: model(REAL), prompt: 'Hello', tools: { get_weather: declared },
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
    const made = await generateText({ model: model(REAL), prompt: 'Who?', tools: { get_weather: declared },
      output: Output.object({ schema: person }), maxRetries: 0 });
    if (made.toolCalls.length) must(typeof made.toolCalls[0].input.city === 'string', made.toolCalls);
    else must(person.safeParse(made.output).success, made.text);
  });
}
process.exit(failures);
