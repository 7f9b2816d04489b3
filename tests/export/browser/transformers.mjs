// Answers of transformers.js to a question about a picture: BUNDLE PICTURE QUESTION TOKENS.
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const from = createRequire(path.join(path.resolve(process.env.POCKETVLM_NODE_MODULES), 'x.js'));
const module = await import(pathToFileURL(from.resolve('@huggingface/transformers')));
const { AutoModelForImageTextToText, AutoProcessor, env, RawImage } = module.default ?? module;

const [bundle, picture, question, tokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = `${path.dirname(bundle)}/`;
const name = path.basename(bundle);
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype: 'fp32' });
const content = [{ type: 'image' }, { type: 'text', text: question }];
const text = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
const inputs = await processor(text, await RawImage.read(picture));
const out = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
const prompt = Array.from(inputs.input_ids.data, Number);
console.log(JSON.stringify({ prompt, ids: Array.from(out.data, Number).slice(prompt.length) }));
